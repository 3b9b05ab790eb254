"""Hashes of weights: of a model's base, whatever file it came from, and of any tree of arrays, to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dvi_jax.model.quantised import Quantised

_CHUNK = 1 << 22  # values


class BaseHash:
    """SHA-256 over name, shape and values of every array of a base tree, added one after the other.

    Values are rounded to bfloat16 first, so that a model has one hash in whatever type a checkpoint keeps it; a
    quantised matrix counts as what it stands for. A head that repeats the embedding counts as tied to it.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._embed: np.ndarray | None = None

    def add(self, name: str, array: np.ndarray | Quantised) -> None:
        """The next array; names, with slashes between their keys, come in the order of sorted keys."""
        if isinstance(array, Quantised):
            self.begin(name, array.shape)
            rows = max(_CHUNK // array.shape[1], 1)
            for start in range(0, array.shape[0], rows):
                self.add_values(array.rows(slice(start, start + rows)).dequantised(np.float32))
            return
        array = np.asarray(array)  # one that is still on the disk is read here
        if name == "embed":
            self._embed = array
        if name == "head" and self._embed is not None and _equal(array, self._embed):
            return
        self.begin(name, array.shape)
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self.add_values(flat[start : start + _CHUNK])

    def begin(self, name: str, shape: tuple[int, ...]) -> None:
        """The next array, whose values come by `add_values`."""
        self._digest.update(f"{name} {list(shape)}\n".encode())

    def add_values(self, values: np.ndarray) -> None:
        """Values of the array that was begun, in its order."""
        self._digest.update(values.reshape(-1).astype(ml_dtypes.bfloat16).view("<u2").data)

    def hexdigest(self) -> str:
        """Of all that was added, in hexadecimal."""
        return self._digest.hexdigest()


def hash_base(base: dict[str, Any]) -> str:
    """`BaseHash` of a whole base tree."""
    digest = BaseHash()
    for name, array in _leaves(base):
        digest.add(name, array)
    return digest.hexdigest()


def hash_tree(tree: dict[str, Any]) -> str:
    """SHA-256 in hexadecimal over name, type, shape and bytes of every array of a tree."""
    digest = hashlib.sha256()
    for name, array in _leaves(tree):
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _equal(head: np.ndarray, embed: np.ndarray) -> bool:
    return head is embed or (head.shape == embed.shape and all(map(np.array_equal, head, embed)))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict) and "scales" in value:
            yield f"{prefix}{key}", Quantised.of({name: np.asarray(part) for name, part in value.items()})
        elif isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
