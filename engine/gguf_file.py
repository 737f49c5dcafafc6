"""Reading GGUF: the file format of llama.cpp, metadata and (quantized) tensors in one file.

Contract: ``GgufFile(path)`` reads the header alone and checks every length in it against the file, so that a
truncated, corrupt or foreign file is one ``ValueError`` that names it; ``tensor(name)`` dequantizes one tensor at a
time. The header is parsed here because the ``gguf`` package takes seconds for a vocabulary; the block formats are that
package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# Metadata value type -> its layout; 7 is a bool, kept as a byte.
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, BF16 = 0, 1, 30
UNQUANTIZED = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. ``shape`` is in torch's order, the fastest dimension last."""

    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file opened for reading. ``metadata`` has every key; arrays are lists.

    Raises:
        ValueError: not a GGUF file, a version or tensor type that is not supported, truncated or corrupt.
        ImportError: the ``gguf`` package is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{path} is empty; expected a GGUF file") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if self._data[:4] != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it starts with {self._data[:4]!r}, not {MAGIC!r}")
        self._position = len(MAGIC)
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path} is a truncated or corrupt GGUF file: {error}") from error

    def _read_header(self) -> None:
        version, num_tensors, num_metadata = self._unpack("IQQ")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version}; supported: 2 and 3, little-endian")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._string()
            self.metadata[key] = self._value(*self._unpack("I"))
        entries = []
        for _ in range(num_tensors):
            name = self._string()
            (num_dims,) = self._unpack("I")
            if num_dims > 4:
                raise self._corrupt(f"tensor {name!r} has {num_dims} dimensions")
            dims = self._unpack(f"{num_dims}Q")
            entries.append((name, tuple(reversed(dims)), *self._unpack("IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._corrupt(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        self.tensors = {name: self._locate(name, shape, kind, start + at) for name, shape, kind, at in entries}

    def _locate(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        block_size, block_bytes = self._block_layout(name, type_id)
        if not shape or shape[-1] % block_size:
            raise self._corrupt(f"tensor {name!r} of shape {[*shape]} does not divide into blocks of {block_size}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > len(self._data):
            raise self._corrupt(f"tensor {name!r} ends {offset + num_bytes - len(self._data)} bytes past the file")
        return GgufTensor(shape, type_id, offset, num_bytes)

    def _block_layout(self, name: str, type_id: int) -> tuple[int, int]:
        """(elements, bytes) of one block of a tensor type."""
        gguf = import_gguf()
        try:
            return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: tensor {name!r} has the unknown GGUF type {type_id}") from None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the matrices are stored in; bf16 if any is quantized."""
        kinds = {tensor.type_id for tensor in self.tensors.values() if len(tensor.shape) > 1}
        return UNQUANTIZED[kinds.pop()] if len(kinds) == 1 and kinds <= UNQUANTIZED.keys() else torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantized to fp32; unquantized ones in the type that they are stored in. On the CPU."""
        gguf = import_gguf()
        info = self.tensors[name]
        stored = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        if info.type_id in UNQUANTIZED:
            # A writable copy: torch warns about read-only memory, and the map must not outlive this call.
            return torch.from_numpy(stored.copy()).view(UNQUANTIZED[info.type_id]).view(info.shape)
        kind = gguf.GGMLQuantizationType(info.type_id)
        try:
            values = gguf.quants.dequantize(stored.reshape(*info.shape[:-1], -1), kind)
        except NotImplementedError:
            raise ValueError(f"{self.path}: tensor {name!r} is {kind.name}, which cannot be dequantized") from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(info.shape)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout  # little-endian, no padding
        values = struct.unpack_from(layout, self._data, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self._position + length
        if end > len(self._data):
            raise self._corrupt(f"a string of {length} bytes at {self._position} ends past the file")
        text = self._data[self._position : end].decode("utf-8")
        self._position = end
        return text

    def _value(self, type_id: int) -> Any:
        if type_id == STRING:
            return self._string()
        if type_id == ARRAY:
            element_type, count = self._unpack("IQ")
            if count > len(self._data) - self._position:  # an element takes a byte at least
                raise self._corrupt(f"an array of {count} elements at {self._position} ends past the file")
            if element_type in SCALAR_FORMATS:
                return list(self._unpack(f"{count}{SCALAR_FORMATS[element_type]}"))
            if element_type == STRING:
                return [self._string() for _ in range(count)]
            raise self._corrupt(f"an array of the unknown type {element_type}")
        if type_id in SCALAR_FORMATS:
            return self._unpack(SCALAR_FORMATS[type_id])[0]
        raise self._corrupt(f"a metadata value of the unknown type {type_id}")

    def _corrupt(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is a truncated or corrupt GGUF file: {what}")


def import_gguf() -> Any:
    """The ``gguf`` package with its dequantization routines, imported on first use."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'pagedattn[models]'") from error
    return gguf
