"""The GGUF container: metadata and tensor table, read with every count and offset checked against the file.

The `gguf` package's own reader trusts the counts it finds, so it is used here for dequantisation alone, and
only when a file holds quantised tensors.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dvi_jax.errors import UserError
from dvi_jax.importing.files import open_file
from dvi_jax.importing.tensors import row_chunks

# The name of one part of a model in several files, as llama.cpp writes and expects it.
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 1000
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 256 << 20
_MAX_STRING = 16 << 20
_MAX_STRINGS = 2 << 20
_MAX_NAME = 256
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16), 28: np.dtype("<f8")}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: `shape` outermost dimension first, `kind` its ggml type number."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    row_bytes: int


class GGUFFile:
    """Header of one GGUF file: `metadata` (scalars, strings, lists, numpy arrays) and `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _read(_Cursor(data, path.name))
        except ValueError as error:
            raise UserError(f"{path.name} is not a GGUF file: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def rows(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, float values) of a tensor, dequantised, in chunks of a multiple of `multiple` rows."""
        for rows, raw in self.raw_rows(name, multiple):
            values = _dequantise(raw, self.tensors[name].kind, f"{self.path.name}: tensor {name}")
            yield rows, values[0] if len(self.tensors[name].shape) == 1 else values

    def raw_rows(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their bytes [n, row bytes]) of a tensor as it lies in the file, in such chunks."""
        tensor = self.tensors[name]
        vector = len(tensor.shape) == 1
        num_rows = 1 if vector else math.prod(tensor.shape[:-1])
        with open_file(self.path) as file:
            file.seek(tensor.offset)
            for start, stop in row_chunks(num_rows, tensor.row_bytes, multiple):
                raw = np.empty((stop - start, tensor.row_bytes), np.uint8)
                if file.readinto(raw.reshape(-1)) != raw.nbytes:
                    raise UserError(f"{self.path.name}: the file ends inside tensor {name}")
                yield slice(None) if vector else slice(start, stop), raw


def open_parts(path: Path) -> list[GGUFFile]:
    """The file at `path`, or all parts of the model that it is a part of, in order.

    A part that is missing or does not belong is a `UserError` that says which.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise UserError(f"{path.name}: split.count={count!r:.100} is not a sensible number of parts")
    if count <= 1:
        return [file]
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UserError(
            f"{path.name} is part {_part_number(file)} of {count}; the parts must be named as they were split,"
            f" model-00001-of-{count:05d}.gguf, and lie together"
        )
    names = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [name.name for name in names if not name.exists()]
    if missing:
        raise UserError(
            f"{path.name} is part {_part_number(file)} of {count}; {', '.join(missing):.300} must lie beside it"
        )
    parts = [file if name == path else GGUFFile(name) for name in names]
    for number, part in enumerate(parts, 1):
        if part.metadata.get("split.count") != count or _part_number(part) != number:
            raise UserError(f"{part.path.name} is not part {number} of {count}, as its name says")
    return parts


def _part_number(file: GGUFFile) -> object:
    """From 1 on, as in the names; the key counts from 0."""
    number = file.metadata.get("split.no")
    return number + 1 if type(number) is int else "?"


class _Cursor:
    """Reads forward through a header; every read checks the bytes that are left."""

    def __init__(self, data: mmap.mmap, label: str) -> None:
        self.data, self.label, self.position, self.strings = data, label, 0, 0

    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int) -> bytes:
        if size > self.left():
            raise UserError(f"{self.label} is truncated or damaged at byte {self.position}")
        self.position += size
        if self.position > _MAX_HEADER:
            raise UserError(f"{self.label}: a header of more than {_MAX_HEADER >> 20} MiB is absurd")
        return self.data[self.position - size : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, limit: int, what: str) -> int:
        value = self.number("Q")
        if value > limit:
            raise UserError(f"{self.label}: {value} {what} are absurd (limit {limit})")
        return value

    def string(self) -> str:
        self.strings += 1
        if self.strings > _MAX_STRINGS:
            raise UserError(f"{self.label}: more than {_MAX_STRINGS} strings in the header are absurd")
        raw = self.take(self.count(_MAX_STRING, "bytes in a string"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.label}: a string before byte {self.position} is not UTF-8") from error

    def name(self, what: str) -> str:
        """A string that messages may repeat."""
        value = self.string()
        if len(value) > _MAX_NAME:
            raise UserError(f"{self.label}: a {what} of {len(value)} characters is absurd (limit {_MAX_NAME})")
        return value

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise UserError(f"{self.label}: unknown metadata type {kind} at byte {self.position}")
        return self.number(_SCALARS[kind])

    def array(self) -> Any:
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            if length > _MAX_STRINGS:
                raise UserError(f"{self.label}: {length} strings in an array are absurd (limit {_MAX_STRINGS})")
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise UserError(f"{self.label}: unsupported array of metadata type {kind} at byte {self.position}")
        dtype = np.dtype("<" + _SCALARS[kind])
        # Numbers stay packed: a list of Python objects would be many times the file.
        return np.frombuffer(self.take(length * dtype.itemsize), dtype)


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if cursor.take(4) != _MAGIC:
        raise UserError(f"{cursor.label} is not a GGUF file: it does not start with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UserError(f"{cursor.label}: GGUF version {version} is not supported, only little-endian 2 and 3")
    num_tensors = cursor.count(_MAX_TENSORS, "tensors")
    num_keys = cursor.count(_MAX_KEYS, "metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name("metadata key")
        if key in metadata:
            raise UserError(f"{cursor.label}: metadata key {key} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    base = _data_start(cursor, metadata.get("general.alignment", 32))
    return metadata, _place(cursor, infos, base)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.name("tensor name"), cursor.number("I")
    if not 1 <= num_dims <= 4:
        raise UserError(f"{cursor.label}: tensor {name} has {num_dims} dimensions, expected 1 to 4")
    dims = [cursor.number("Q") for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")


def _data_start(cursor: _Cursor, alignment: Any) -> int:
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise UserError(f"{cursor.label}: general.alignment={alignment!r:.100} is not a sensible power of two")
    return -(-cursor.position // alignment) * alignment


def _place(cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], int, int]], base: int) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise UserError(f"{cursor.label}: tensor {name} occurs twice")
        row_bytes = _row_bytes(shape[-1], kind, f"{cursor.label}: tensor {name}")
        end = base + offset + row_bytes * math.prod(shape[:-1])
        if end > len(cursor.data):
            raise UserError(f"{cursor.label} is truncated: tensor {name} ends at byte {end}")
        tensors[name] = GGUFTensor(shape, kind, base + offset, row_bytes)
    return tensors


def _row_bytes(width: int, kind: int, where: str) -> int:
    if kind in _PLAIN:
        return width * _PLAIN[kind].itemsize
    constants = _gguf_package(where).constants
    try:
        block, size = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise UserError(f"{where} has unknown type {kind}") from error
    if width % block:
        raise UserError(f"{where}: rows of {width} are not a multiple of the type's block of {block}")
    return width // block * size


def _dequantise(raw: np.ndarray, kind: int, where: str) -> np.ndarray:
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind])
    package = _gguf_package(where)
    try:
        return package.quants.dequantize(raw, package.constants.GGMLQuantizationType(kind))
    except NotImplementedError as error:
        raise UserError(f"{where}: the gguf package cannot dequantise this type ({error})") from error


def _gguf_package(where: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{where} is quantised; reading it needs the gguf package (pip install gguf)") from error
    return gguf
