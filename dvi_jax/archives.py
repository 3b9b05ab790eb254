"""Arrays by name from .npz files, which may be damaged, something else, or made to take all memory."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

# What reading a damaged zip archive raises; RuntimeError where a bit says encrypted or packed in another way.
DAMAGED_ZIP = (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
# And what numpy adds, where the header of an array is damaged or the file is something else.
DAMAGED_NPZ = (*DAMAGED_ZIP, TypeError, MemoryError, OverflowError, SyntaxError, tokenize.TokenError)

MOST_INFLATED = 32  # times its size that a file may come to, besides what is no matter for any machine:
SMALL = 32 * 2**20  # bytes

Header = tuple[tuple[int, ...], np.dtype]  # shape and type of an array


def read_npz(
    path: str | Path, *names: str, expect: Callable[[dict[str, Header]], None] = lambda headers: None
) -> dict[str, np.ndarray]:
    """The arrays `names`, or all of them; anything else than a whole .npz with these raises one of `DAMAGED_NPZ`.

    Before any of it is read, its arrays' headers are given to `expect`, which may raise what it likes, and their bytes
    counted: a file that would come to far more than its own size is refused.
    """
    headers = read_headers(path, *names)
    expect(headers)
    most, needed = MOST_INFLATED * Path(path).stat().st_size + SMALL, 0
    for shape, dtype in headers.values():
        needed += prod(shape) * dtype.itemsize
    if needed > most:
        raise ValueError(f"its arrays need {needed} bytes, more than the {most} that a file of its size may")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in headers}


def read_headers(path: str | Path, *names: str) -> dict[str, Header]:
    """Shape and type of the arrays `names`, or of all: `DAMAGED_NPZ` as for `read_npz`, and for what is no array."""
    if not Path(path).is_file():  # to open a pipe would wait for who writes it
        raise FileNotFoundError("it is missing, or not a file")
    headers: dict[str, Header] = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.namelist()
        for name in names or [entry.removesuffix(".npy") for entry in entries]:
            if f"{name}.npy" not in entries:
                raise ValueError(f"{name} is not an array in the archive")
            with archive.open(f"{name}.npy") as file:
                headers[name] = _read_header(file)
    return headers


def _read_header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"arrays of format {version} are not read")
    shape, _, dtype = readers[version](file)
    if any(length < 0 for length in shape):
        raise ValueError(f"an array cannot have the shape {shape}")
    return shape, dtype
