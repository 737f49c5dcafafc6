"""Runs Gluon kernels for Hopper on a CPU, slowly: what they compute, and in what order they wait for each other.

Triton's interpreter has no Gluon. Here a kernel's Python functions run on torch tensors, with this module in the place
of Gluon's: each partition of ``warp_specialize`` is a thread, a barrier is a condition, and what is asynchronous on the
chip happens as early or as late as the kernel's waits allow: a product when it is waited for, a copy at once or when it
is waited for, as chance has it. So a wait that is missing may show in the result; and it raises, whatever chance has
done, as each access to shared memory must be ordered behind those before it (``tests/kernels/happens_before.py``).
Shared memory begins as NaN, reads and writes outside of a tensor raise, and a wait that nobody ends raises after a
while. Layouts are ignored: whether they fit together is what compiling tells (``tests/kernels/test_compile.py``).
"""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from itertools import product
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.language.core import constexpr
from triton.runtime.jit import JITFunction

from pagedattn.kernels.tiling import CacheRows
from tests.kernels.happens_before import (
    AGENTS,
    FENCED,
    ORDERED,
    UNTOLD,
    Clock,
    History,
    Known,
    Order,
    RaceError,
    assigned,
    nothing,
)

PATIENCE_SECONDS = 20.0
LANES = 32
chance = random.Random(0)


class Value(Tensor):
    """A tensor or scalar of a kernel: operators never change it in place, as in Triton."""

    @staticmethod
    def of(value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensor.as_subclass(Value)  # type: ignore[arg-type]

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        return Value.of(self.view(dtype.torch) if bitcast else Tensor.to(self, dtype.torch))

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self + other

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]
        return self - other

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        return self * other


class Dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.torch = dtype
        self.primitive_bitwidth = dtype.itemsize * 8
        self.element_ty = self  # of a pointer to it


class Pointer:
    """Element offsets into a tensor's storage."""

    def __init__(self, memory: Tensor | None, offset: Any, dtype: torch.dtype) -> None:
        self.memory, self.offset, self.dtype = memory, offset, Dtype(dtype)

    @classmethod
    def of(cls, tensor: Tensor | None) -> Pointer:
        if tensor is None:
            return cls(None, Value.of(0), torch.float32)
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(memory, Value.of(tensor.storage_offset()), tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other, self.dtype.torch)

    def select(self, mask: Any, *others: Any) -> tuple[Tensor, ...]:
        """Offsets within the memory and, broadcast with them, the mask and others."""
        values = torch.broadcast_tensors(self.offset, Value.of(True if mask is None else mask), *map(Value.of, others))
        offset, chosen = values[0][values[1]], values[1]
        assert self.memory is not None or not chosen.any(), "memory that there is not"
        if self.memory is not None and chosen.any():
            assert 0 <= int(offset.min()) <= int(offset.max()) < self.memory.numel(), "outside of the tensor"
        return offset, chosen, *values[2:]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, block: Block, name: str) -> None:
        self.block, self.condition = block, block.order.condition
        self.agent = block.order.add_barrier(name)
        self.count = self.missing = self.bytes = self.phases = 0
        self.late: list[Any] = []  # copies that nobody has waited for yet
        self.arrived, self.complete = nothing(), nothing()  # what arrivals have told, and had at the last phase's end

    @property
    def epoch(self) -> int:
        """That of copies which this phase waits for."""
        return self.phases + 1

    def change(self, arrivals: int, expected: int, known: Known) -> None:
        with self.condition:
            assert self.count, "not initialized"
            self.missing -= arrivals
            self.bytes += expected
            np.maximum(self.arrived, known, out=self.arrived)
            if self.missing < 0:
                raise RaceError("more arrivals than a phase has")
            if self.missing == self.bytes == 0:
                self.missing = self.count
                self.phases += 1
                self.complete = self.arrived.copy()
                self.condition.notify_all()
        if arrivals and chance.random() < 0.3:  # others go on
            time.sleep(1e-3)

    def copy(self, copy: Any) -> None:
        """A copy that this barrier will know of."""
        with self.condition:
            if chance.random() < 0.5:
                self.late.append(copy)
                self.condition.notify_all()
                return
        copy()

    def copied(self, epoch: int, *seen: int) -> Known:
        """What the end of a copy tells: nothing of who asked for it."""
        known = nothing()
        known[seen, self.agent] = epoch
        return known

    def wait(self, parity: Any) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            with self.condition:
                self.condition.wait_for(
                    lambda: self.late or self.phases % 2 != int(parity) or self.block.errors, PATIENCE_SECONDS
                )
                if self.phases % 2 != int(parity):
                    thread.clock.learn(self.complete)
                    return
                late, self.late = self.late, []
            for copy in late:
                copy()
            if self.block.errors:
                raise RuntimeError("another partition has failed")
            if time.monotonic() > end:
                raise TimeoutError("a barrier that nobody completes")


class Barriers:
    def __init__(self, block: Block, name: str, count: int) -> None:
        self.barriers = [Barrier(block, f"{name}[{number}]") for number in range(count)]

    def index(self, number: Any) -> Barrier:
        return self.barriers[int(number)]


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor, history: History) -> None:
        self.memory, self.history = memory, history
        self.dtype, self.shape = Dtype(memory.dtype), tuple(memory.shape)

    def _view(self, change: Any) -> Shared:
        """A change that counts dimensions from the last one."""
        history = self.history
        return Shared(change(self.memory), History(history.order, history.name, change(history.cells)))

    def index(self, number: Any) -> Shared:
        return self._view(lambda part: part.select(-len(self.shape), int(number)))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(lambda part: part.narrow(dim - len(self.shape), start, length))

    def permute(self, order: Any) -> Shared:
        rank = len(self.shape)
        return self._view(lambda part: part.movedim([dim - rank for dim in order], list(range(-rank, 0))))

    def load(self, layout: Any) -> Any:
        self.history.read(thread.clock, thread.clock.known[ORDERED])
        return Value.of(self.memory.clone())

    def store(self, value: Any) -> None:
        assert value.shape == self.memory.shape
        self.history.write(thread.clock, ORDERED, thread.clock.agent, thread.clock.epoch)
        self.memory.copy_(value)


class Product:
    """A product of a warp group that is under way. Its operands are read when it is waited for."""

    def __init__(self, a: Any, b: Shared, sum_: Any, use_acc: bool) -> None:
        self.operands, self.result = (a, b, sum_, use_acc), None
        self.known = thread.clock.tell()[FENCED]

    def finish(self) -> Any:
        if self.result is None:
            a, b, sum_, use_acc = self.operands
            for operand in (a, b):
                if isinstance(operand, Shared):
                    operand.history.read(thread.clock, self.known)
            left = a.memory if isinstance(a, Shared) else a
            sums = (left.double() @ b.memory.double()).float()  # whatever the shape
            if isinstance(sum_, Product):  # the one before it, of the same sum
                sum_ = sum_.finish()
            self.result = Value.of(sums + sum_ if use_acc else sums)
        return self.result


class MatrixDescriptor:
    """What the copy engine knows of a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dtype, self.layout = Dtype(matrix.dtype), None

    def fetch(self, row: int, column: int, box: Shared) -> None:
        rows, columns = box.shape
        box.memory.zero_()
        first, end = max(0, row), min(self.matrix.shape[0], row + rows)
        if first < end:
            part = self.matrix[first:end, column : column + columns]
            box.memory[first - row : end - row, : part.shape[1]] = part


class Descriptor(MatrixDescriptor):
    """What the copy engine knows of a cache."""

    def __init__(self, cache: Tensor, rows: CacheRows, page: int) -> None:
        shape, strides = (rows.num_rows, rows.num_columns), (cache.stride(1), 1)
        super().__init__(cache.as_strided(shape, strides, cache.storage_offset()))


class Block:
    """What the threads of one thread block share."""

    def __init__(self, program: tuple[int, int]) -> None:
        self.program = program
        self.order = Order()
        self.errors: list[BaseException] = []


class Thread(threading.local):
    block: Block
    clock: Clock
    products: list[Product]
    copies: list[Any]


thread = Thread()
atomic = threading.Lock()


def _in_thread(block: Block, clock: Clock, function: Any, *arguments: Any) -> None:
    thread.block, thread.clock, thread.products, thread.copies = block, clock, [], []
    try:
        function(*arguments)
        assert not thread.products, "a product that is not waited for"
    except BaseException as error:  # noqa: BLE001 - raised again by who started the thread
        with block.order.condition:
            block.errors.append(error)
            block.order.condition.notify_all()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, constexpr) else value


# --- the place of Gluon -----------------------------------------------------------------------------------------------


def load(pointer: Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Any:
    offset, chosen = pointer.select(mask)
    result = torch.full(chosen.shape, other, dtype=pointer.dtype.torch)
    if pointer.memory is not None:
        result[chosen] = pointer.memory[offset]
    return Value.of(result if result.is_floating_point() else result.long())


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, chosen, values = pointer.select(mask, value)
    if pointer.memory is not None:
        pointer.memory[offset] = values[chosen].as_subclass(Tensor).to(pointer.dtype.torch)


def atomic_add(pointer: Pointer, value: int, sem: str) -> Any:
    with atomic:
        old = load(pointer)
        store(pointer, old + value)
        return old


def inline_asm_elementwise(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if pack == 1:
        assert not args or asm.startswith("mov.b32"), asm
        return Value.of(args[0]) if args else None
    (packed,), results = args, dtype if isinstance(dtype, tuple) else (dtype,)
    assert pack == packed.element_size() * 4 == 4
    words = packed.as_subclass(Tensor).contiguous().view(torch.uint32).long()
    outputs = run_ptx(asm, words, constraints.count("="))
    per_result = len(outputs) // len(results)
    values = []
    for number, type_ in enumerate(results):
        halves = outputs[number * per_result : (number + 1) * per_result]
        bits = torch.stack([part for word in halves for part in (word & 0xFFFF, word >> 16)], -1)
        values.append(Value.of(bits.to(torch.uint16).view(type_.torch).reshape(packed.shape)))
    return tuple(values) if isinstance(dtype, tuple) else values[0]


def _permute_bytes(a: Any, b: Any, selector: int) -> Any:
    both = [(word >> 8 * byte) & 0xFF for word in (a, b) for byte in range(4)]
    return sum(both[(selector >> 4 * place) & 7] << 8 * place for place in range(4))


def _subtract_halves(a: Any, b: Any, dtype: torch.dtype) -> Any:
    result: Any = 0
    for shift in (0, 16):
        left, right = (((torch.as_tensor(word) >> shift) & 0xFFFF).to(torch.uint16).view(dtype) for word in (a, b))
        result = result | ((left - right).view(torch.uint16).long() << shift)
    return result


def _combine(a: Any, b: Any, c: Any, table: int) -> Any:
    result: Any = 0
    for index in (index for index in range(8) if table >> index & 1):
        term = a if index & 4 else ~a
        for operand, bit in ((b, 2), (c, 1)):
            term = term & (operand if index & bit else ~operand)
        result = result | term
    return result & 0xFFFFFFFF


PTX: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _combine,
    "prmt.b32": _permute_bytes,
    "sub.f16x2": lambda a, b: _subtract_halves(a, b, torch.float16),
}


def run_ptx(asm: str, words: Tensor, num_outputs: int) -> list[Tensor]:
    """Straight-line PTX over 32-bit words; ``$number_of_outputs`` is the input."""
    registers: dict[str, Any] = {f"${num_outputs}": words}
    for line in asm.split(";"):
        operation, _, rest = line.strip(" \n{}").partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        values = [registers[name] if name in registers else int(name, 0) for name in operands]
        registers[target] = PTX[operation](*values)
    return [registers[f"${number}"] for number in range(num_outputs)]


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    started = Product(a, b, acc, use_acc)
    if not is_async:
        assert not thread.products
        return started.finish()
    thread.products.append(started)
    return started


def warpgroup_mma_wait(num_outstanding: int, deps: list[Product]) -> Any:
    if chance.random() < 0.3:  # long enough for others to overwrite what they may
        time.sleep(1e-3)
    while len(thread.products) > num_outstanding:
        thread.products.pop(0).finish()
    assert all(waited.result is not None for waited in deps), "a product that is not waited for"
    return deps[0].result if len(deps) == 1 else tuple(waited.result for waited in deps)


def fetch(descriptor: Descriptor, place: list[Any], barrier: Barrier, box: Shared) -> None:
    row, column = map(int, place)
    size = box.memory.numel() * box.memory.element_size()
    epoch = barrier.epoch
    box.history.write(thread.clock, FENCED, barrier.agent, epoch)

    def run() -> None:
        descriptor.fetch(row, column, box)
        barrier.change(0, -size, barrier.copied(epoch, ORDERED, FENCED))

    barrier.copy(run)


def copy(box: Shared, pointer: Pointer) -> None:
    box.history.write(thread.clock, ORDERED, UNTOLD % AGENTS, UNTOLD // AGENTS)
    thread.copies.append((box, pointer))


def copies_arrive(barrier: Barrier, increment_count: bool) -> None:
    assert not increment_count
    copies, thread.copies = thread.copies, []
    epoch = barrier.epoch
    for box, _ in copies:
        box.history.tell(barrier.agent, epoch)

    def run() -> None:
        for box, pointer in copies:
            box.memory.copy_(load(pointer).as_subclass(Tensor))
        barrier.change(LANES, 0, barrier.copied(epoch, ORDERED))

    barrier.copy(run)


def init(barrier: Barrier, count: Any) -> None:
    barrier.count = barrier.missing = int(_plain(count))


def allocate_shared_memory(dtype: Dtype, shape: list[int], layout: Any) -> Any:
    name = assigned(sys._getframe(1))
    if layout == "barrier":
        return Barrier(thread.block, name) if len(shape) == 1 else Barriers(thread.block, name, shape[0])
    poison = math.nan if dtype.torch.is_floating_point else torch.iinfo(dtype.torch).max
    return Shared(torch.full(shape, poison).to(dtype.torch), History.of(thread.block.order, name, shape))


def warp_specialize(partitions: list[Any], worker_num_warps: list[int], worker_num_regs: list[int]) -> None:
    block, known = thread.block, thread.clock.tell()
    clocks = [
        block.order.start(1 + number, f"{function.__name__} ({number})", known)
        for number, (function, _) in enumerate(partitions)
    ]
    threads = [
        threading.Thread(target=_in_thread, args=(block, clock, function, *arguments), daemon=True)
        for clock, (function, arguments) in zip(clocks, partitions, strict=True)
    ]
    for started in threads:
        started.start()
    for started, clock in zip(threads, clocks, strict=True):
        started.join()
        thread.clock.learn(clock.known)


def _of_two(function: Any) -> Any:
    return lambda a, b: Value.of(function(Value.of(a), Value.of(b)))


def _of_one(function: Any) -> Any:
    return lambda a: Value.of(function(Value.of(a)))


def _rounded_once(function: Any) -> Any:
    """In fp32 by way of fp64: torch's own results depend on an element's place in its tensor."""
    return lambda *arguments: Value.of(function(*(Value.of(value).double() for value in arguments)).float())


def _sum(value: Any, axis: int) -> Any:
    """By way of fp64: in what order torch sums depends on the shape."""
    return Value.of(Tensor.to(value.double().sum(axis), value.dtype))


def _filled(value: Any, shape: list[int], dtype: Dtype) -> Any:
    return Value.of(torch.full(shape, float(value) if dtype.torch.is_floating_point else int(value), dtype=dtype.torch))


def _no_layout(*arguments: Any) -> Any:
    return SimpleNamespace(instr_shape=arguments[2] if len(arguments) > 2 else None)


DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
LAYOUTS = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout")
gluon_language = SimpleNamespace(
    **{name: Dtype(getattr(torch, name)) for name in DTYPES},
    **dict.fromkeys((*LAYOUTS, "SwizzledSharedLayout", "DistributedLinearLayout"), _no_layout),
    constexpr=lambda value: value,
    static_range=range,
    load=load,
    store=store,
    atomic_add=atomic_add,
    inline_asm_elementwise=inline_asm_elementwise,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    program_id=lambda axis: Value.of(thread.block.program[axis]),
    num_warps=lambda: 4,
    arange=lambda start, end, layout=None: Value.of(torch.arange(start, end)),
    full=lambda shape, value, dtype, layout=None: _filled(value, shape, dtype),
    zeros=lambda shape, dtype, layout=None: _filled(0, shape, dtype),
    convert_layout=lambda value, layout: value,
    permute=lambda value, order: value.permute(order),
    where=lambda mask, a, b: Value.of(torch.where(Value.of(mask), Value.of(a), Value.of(b))),
    sum=_sum,
    max=lambda value, axis: Value.of(value.amax(axis)),
    minimum=_of_two(torch.minimum),
    maximum=_of_two(torch.maximum),
    fma=_rounded_once(lambda a, b, c: a * b + c),
    exp=_rounded_once(torch.exp),
    exp2=_rounded_once(torch.exp2),
    log2=_rounded_once(torch.log2),
    abs=_of_one(torch.abs),
    floor=_of_one(torch.floor),
)
PLACES: dict[str, Any] = {
    "gl": gluon_language,
    "mbarrier": SimpleNamespace(
        init=init,
        wait=lambda barrier, phase: barrier.wait(phase),
        expect=lambda barrier, size: barrier.change(1, size, thread.clock.tell()),
        arrive=lambda barrier, count=1: barrier.change(count, 0, thread.clock.tell()),
        MBarrierLayout=lambda: "barrier",
    ),
    "async_copy": SimpleNamespace(mbarrier_arrive=copies_arrive),
    "fetch": fetch,
    "copy": copy,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: thread.clock.fence(),
    "synchronize": lambda: None,
}


def interpreted(function: Any, translated: dict[int, Any] | None = None) -> Any:
    """A jit function as a Python function on this module's values, with all that it calls."""
    translated = {} if translated is None else translated
    if id(function) in translated:
        return translated[id(function)]
    source = function.fn
    names: dict[str, Any] = dict(source.__globals__)
    result = translated[id(function)] = FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    for name in source.__code__.co_names:
        value = names.get(name)
        if name in PLACES:
            names[name] = PLACES[name]
        elif isinstance(value, constexpr):
            names[name] = value.value
        elif isinstance(value, JITFunction):
            names[name] = interpreted(value, translated)
        elif hasattr(value, "__triton_builtin__") or isinstance(value, ModuleType):
            raise NotImplementedError(name)
        elif callable(value) and hasattr(value, "__wrapped__"):  # a function of constants
            names[name] = lambda *arguments: None
    return result


class InterpretedLauncher:
    """In the place of ``pagedattn.kernels.launcher.Launcher``; monkeypatch ``describe`` with ``Descriptor`` as well."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = interpreted(kernel)

    def prepare(self, key: Any, programs: tuple[int, int], device: Any, sizes: tuple[Any, ...], **options: Any) -> Any:
        def launch(tensors: tuple[Tensor | None, ...], descriptors: Any) -> None:
            arguments = (*descriptors.given, *map(Pointer.of, tensors), *sizes)
            for program in product(*map(range, programs)):
                block = Block(program)
                clock = block.order.start(0, self._kernel.__name__, nothing())
                _in_thread(block, clock, self._kernel, *arguments)
                if block.errors:
                    raise block.errors[0]
                block.order.end(clock)

        return launch
