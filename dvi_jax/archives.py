"""Arrays by name from .npz files, which may be damaged or something else."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What reading a damaged zip archive raises; RuntimeError where a bit says encrypted or packed in another way.
DAMAGED_ZIP = (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
# And what numpy adds, where the header of an array is damaged or the file is something else.
DAMAGED_NPZ = (*DAMAGED_ZIP, TypeError, MemoryError, OverflowError, SyntaxError, tokenize.TokenError)


def read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays `names`, or all of them; anything else than a whole .npz with these raises one of `DAMAGED_NPZ`."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in names or file.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of an entry that does not begin as an array does
            raise ValueError(f"{name} is not an array")
    return arrays
