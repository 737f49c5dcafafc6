"""Which compiled code a launch takes, and on which device and stream, with the driver's part played by recorders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagedattn.kernels.launcher import Descriptors, Launch, Launcher, specialized


class Driver:
    """Stands for Triton's compiler and the CUDA driver; remembers what was compiled and launched, and where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current_device = 0
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current_device, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        previous, self.current_device = self.current_device, index
        yield
        self.current_device = previous

    def __getitem__(self, programs: tuple[int, int]) -> Any:
        def compile_and_launch(*arguments: Any, **options: Any) -> Any:
            self.compiled.append((self.current_device, arguments, options))
            return SimpleNamespace(run=self.run, function=len(self.compiled), packed_metadata=options)

        return compile_and_launch

    def run(self, *arguments: Any) -> None:
        self.launched.append((self.current_device, *arguments))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def prepare(launcher: Launcher, device: int = 0, key: int = 0, sees_bits: bool = False) -> Launch:
    return launcher.prepare((key,), (7, 2), torch.device("cuda", device), (11, 12), sees_bits, num_warps=4)


def test_second_launch_takes_what_the_first_compiled(driver: Driver) -> None:
    launcher, tensor = Launcher(driver), torch.zeros(4)
    for _ in range(3):
        prepare(launcher)((tensor, None))
    assert driver.compiled == [(0, (tensor, None, 11, 12), {"num_warps": 4})]
    launch = (7, 2, 1, 100, 1, {"num_warps": 4}, None, None, None, tensor.data_ptr(), 0, 11, 12)
    assert driver.launched == [(0, *launch)] * 2


def test_runs_on_the_device_of_its_tensors(driver: Driver) -> None:
    """On that device's stream, with code loaded there, and the current device is what it was."""
    launcher, tensors = Launcher(driver), (torch.zeros(4),)
    for device in (1, 0, 1, 0):
        prepare(launcher, device)(tensors)
        assert driver.current_device == 0
    assert [device for device, *_ in driver.compiled] == [1, 0]
    assert [(device, stream) for device, _, _, _, stream, *_ in driver.launched] == [(1, 101), (0, 100)]
    assert [function for _, _, _, _, _, function, *_ in driver.launched] == [1, 2]


def test_keys_and_alignments_are_told_apart(driver: Driver) -> None:
    launcher, storage = Launcher(driver), torch.zeros(64, dtype=torch.uint8)
    first = storage[(-storage.data_ptr()) % 16 :]
    for key in (0, 1):
        for tensors in ((first, first), (first[1:], first), (first, first[8:]), (first[16:], first)):
            prepare(launcher, key=key)(tensors)
    assert len(driver.compiled) == 6  # the last is aligned as the first
    assert len(driver.launched) == 2


def test_descriptors_come_first_and_are_handed_on(driver: Driver) -> None:
    launcher, tensor = Launcher(driver), torch.zeros(4)
    for _ in range(2):
        prepare(launcher)((tensor,), Descriptors("key", "value"))
    assert driver.compiled[0][1] == ("key", "value", tensor, 11, 12)
    assert driver.launched[0][-5:] == ("key", "value", tensor.data_ptr(), 11, 12)


def test_descriptors_are_encoded_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's launcher is that of 3.6."""
    driver_module = pytest.importorskip("triton.backends.nvidia.driver")
    encoded: list[Any] = []

    def encode(descriptor: str, layout: str) -> list[str]:
        encoded.append(descriptor)
        return [f"map of {descriptor} as {layout}", "size"]

    def wrap(launcher: Any) -> Any:
        return lambda *arguments: launcher(*arguments)

    monkeypatch.setattr(driver_module, "make_tensordesc_arg", encode, raising=False)
    flags = {"launch_cooperative_grid": False, "launch_pdl": True, "global_scratch_size": 0, "profile_scratch_size": 0}
    kernel = SimpleNamespace(
        run=SimpleNamespace(launch=wrap(driver.run), **flags),
        function=5,
        packed_metadata="packed",
        metadata=SimpleNamespace(tensordesc_meta=["one", "other"]),
    )
    monkeypatch.setattr(Launch, "_compile", lambda self, tensors, descriptors: kernel)
    launcher, tensor, descriptors = Launcher(driver), torch.zeros(4), Descriptors("key", "value")
    for _ in range(3):
        prepare(launcher)((tensor,), descriptors)
    assert encoded == ["key", "value"]
    maps = ("map of key as one", "size", "map of value as other", "size")
    launch = (7, 2, 1, 100, 5, False, True, None, None, "packed", None, None, None, *maps, tensor.data_ptr(), 11, 12)
    assert driver.launched == [(0, *launch)] * 2


def test_bits_of_fp8(driver: Driver) -> None:
    tensors = (torch.zeros(4, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.float16), None)
    prepare(Launcher(driver), sees_bits=True)(tensors)
    _, (first, second, third, *_), _ = driver.compiled[0]
    assert first.dtype == torch.uint8
    assert second is tensors[1]
    assert third is None


def test_specialized_tells_apart_what_triton_does() -> None:
    assert specialized((16, 32)) == specialized((160, 48))
    for one, other in ((1, 2), (16, 17), (16, 2**31), (17, 2**31 + 1)):
        assert specialized((one,)) != specialized((other,))
