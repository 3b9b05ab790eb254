"""Arrays by name from .npz files, which may be damaged or something else."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What zipfile, zlib and numpy raise on a damaged archive; RuntimeError where a bit says encrypted or packed otherwise.
DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)


def read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays `names`, or all of them; anything else than a whole .npz with these raises one of `DAMAGED`."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in names or file.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of an entry that does not begin as an array does
            raise ValueError(f"{name} is not an array")
    return arrays
