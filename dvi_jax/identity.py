"""Hashes of weights: of a model's base, whatever file it came from, and of any tree of arrays, to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

_CHUNK = 1 << 22  # values


def hash_base(base: dict[str, Any]) -> str:
    """SHA-256 in hexadecimal over name, shape and values of every array of a base tree.

    Values are rounded to bfloat16 first, so that a model has one hash in whatever type a checkpoint keeps it. A head
    that repeats the embedding counts as tied to it.
    """
    digest = hashlib.sha256()
    for name, leaf in _leaves(base):
        array = np.asarray(leaf)  # one that is still on the disk is read here
        if name == "head" and _equal(array, np.asarray(base["embed"])):
            continue
        digest.update(f"{name} {list(array.shape)}\n".encode())
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            digest.update(flat[start : start + _CHUNK].astype(ml_dtypes.bfloat16).view("<u2").data)
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


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
