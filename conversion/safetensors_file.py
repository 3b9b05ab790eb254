"""The safetensors format: a bounded, fully checked reader that streams rows, and a streaming writer.

The reader copies through a small buffer instead of mapping the file, so that pages of a large model do not
count as resident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion.tensors import Rows, row_chunks
from dvi_jax.errors import UserError
from dvi_jax.importing.files import open_file, parse_json_object

MAX_HEADER_BYTES = 8 << 20
_MAX_NAME, _MAX_DIMENSIONS = 256, 8
_MAX_NUMBER = 1 << 48  # of a dimension or an offset; multiplying longer ones takes for ever
_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OTHER_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_CODES = {dtype: code for code, dtype in _FLOATS.items()}


@dataclass(frozen=True)
class _Entry:
    code: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """One safetensors file, a `TensorSource`. A damaged or dishonest header is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.label = path.name
        self.files: tuple[Path, ...] = (path,)
        self._path = path
        self._entries = _read_header(path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def chunks(self, name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        entry = self._entries[name]
        dtype = _FLOATS.get(entry.code)
        if dtype is None:
            raise UserError(f"{self.label}: {name} is of type {entry.code}; weights must be F32, F16, BF16 or F64")
        num_rows, width = entry.shape[0], math.prod(entry.shape[1:])
        with open_file(self._path) as file:
            file.seek(entry.offset)
            for start, stop in row_chunks(num_rows, width * dtype.itemsize):
                values = np.empty((stop - start, *entry.shape[1:]), dtype)
                if file.readinto(values.view(np.uint8).reshape(-1)) != values.nbytes:
                    raise UserError(f"{self.label}: the file ends inside tensor {name}")
                yield slice(start, stop), values


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` (float32, bfloat16, float16 or float64) one by one, without a second copy in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with open_file(path) as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path.name} is not a safetensors file, or is truncated: header of {length} bytes")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path.name}: a header of {length} bytes is absurd (limit {MAX_HEADER_BYTES})")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = parse_json_object(raw.decode("utf-8"), f"the header of {path.name}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not a safetensors file: its header is not UTF-8") from error
    header.pop("__metadata__", None)
    return {name: _entry(path.name, name, info, 8 + length, size) for name, info in header.items()}


def _entry(label: str, name: str, info: Any, base: int, size: int) -> _Entry:
    if len(name) > _MAX_NAME:
        raise UserError(f"{label}: a tensor name of {len(name)} characters is absurd (limit {_MAX_NAME})")
    match info:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]} if len(
            shape
        ) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n <= _MAX_NUMBER for n in (*shape, begin, end)):
            pass
        case _:
            raise UserError(f"{label}: the header entry of tensor {name} is malformed")
    item = _FLOATS[code].itemsize if code in _FLOATS else _OTHER_SIZES.get(code)
    if item is None:
        raise UserError(f"{label}: {name} is of type {code[:20]}; weights must be F32, F16, BF16 or F64")
    if begin > end or end - begin != math.prod(shape) * item:
        raise UserError(f"{label}: the bytes of tensor {name} do not agree with its shape")
    if base + end > size:
        raise UserError(f"{label} is truncated: tensor {name} ends at byte {base + end}, the file at {size}")
    return _Entry(code, tuple(shape), base + begin)
