"""Streaming named tensors into a nested tree of joined arrays.

A `TensorSource` gives shapes without reading weights, and weights in chunks of rows, so that an import holds
its output and one chunk. All names and shapes are checked before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from dvi_jax.errors import UserError

CHUNK_BYTES = 16 << 20
# The densest GGUF type packs 7.1 weights into a byte, so a file that claims more than 8 is not truthful.
MAX_ELEMENTS_PER_BYTE = 8
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Tree = dict[str, Any]
Rows = slice | np.ndarray | tuple[()]


class TensorSource(Protocol):
    """Named tensors in one or more files."""

    @property
    def label(self) -> str:
        """How messages name it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it reads."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""

    def chunks(self, name: str) -> Iterator[tuple[Rows, np.ndarray]]:
        """Pieces of tensor `name` as (rows they belong to, floating-point values); every row comes once."""
        ...


@dataclass(frozen=True)
class Slot:
    """Source tensor `name` of `shape` is rows `start ..` of the array at `path` in the tree."""

    name: str
    path: tuple[str, ...]
    start: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.shape[0])


def row_chunks(num_rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Split `num_rows` into ranges of about `CHUNK_BYTES`, all but the last a multiple of `multiple` rows."""
    step = max(CHUNK_BYTES // max(row_bytes * multiple, 1), 1) * multiple
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def check_slots(source: TensorSource, slots: Iterable[Slot], ignored: Callable[[str], bool]) -> list[Slot]:
    """The slots as a list, once every name is present with its shape and no name is left over.

    Names for which `ignored` is true may be left over. `UserError` names the first tensor that is wrong.
    """
    checked: list[Slot] = []
    for slot in slots:
        shape = source.shapes.get(slot.name)
        if shape is None:
            raise UserError(f"{source.label}: tensor {slot.name} is missing (expected shape {_text(slot.shape)})")
        if shape != slot.shape:
            raise UserError(f"{source.label}: {slot.name} has shape {_text(shape)}, expected {_text(slot.shape)}")
        checked.append(slot)
    known = {slot.name for slot in checked}
    unknown = sorted(name for name in source.shapes if name not in known and not ignored(name))
    if unknown:
        raise UserError(f"{source.label}: unknown tensor {unknown[0][:256]}, not part of a plain Llama of this config")
    _check_size(source, checked)
    return checked


def load_tree(source: TensorSource, slots: list[Slot], dtype: str) -> Tree:
    """Read checked `slots` into new arrays of `dtype`; weights that are not finite in it are a `UserError`."""
    tree = _allocate(slots, DTYPES[dtype])
    for slot in slots:
        fill(get_path(tree, slot.path)[slot.rows], source, slot.name)
    return tree


def fill(target: np.ndarray, source: TensorSource, name: str) -> None:
    """Copy tensor `name` into `target` chunk by chunk, cast to its dtype."""
    for rows, values in source.chunks(name):
        target[rows] = cast_finite(values, target.dtype, source, name)


def cast_finite(values: np.ndarray, dtype: np.dtype, source: TensorSource, name: str) -> np.ndarray:
    """Values of tensor `name` as `dtype`; `UserError` for those that are not finite in it."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        fault = f"values too large for {dtype}" if np.isfinite(values).all() else "NaN or infinite values"
        raise UserError(f"{source.label}: tensor {name} holds {fault}")
    return cast


def get_path(tree: Tree, path: tuple[str, ...]) -> Any:
    """The array at `path`, of the kind that the tree holds."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def put_path(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
    """Put `leaf` at `path`, making the nodes above it."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def array_for(slots: Iterable[Slot], dtype: np.dtype) -> np.ndarray:
    """A new array for `slots` of one path."""
    last = max(slots, key=lambda slot: slot.rows.stop)
    return np.empty((last.rows.stop, *last.shape[1:]), dtype)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(dotted name, array) of every leaf, in the tree's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _allocate(slots: list[Slot], dtype: np.dtype) -> Tree:
    by_path: dict[tuple[str, ...], list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    tree: Tree = {}
    for path, joined in by_path.items():
        put_path(tree, path, array_for(joined, dtype))
    return tree


def _check_size(source: TensorSource, slots: list[Slot]) -> None:
    elements = sum(math.prod(slot.shape) for slot in slots)
    size = sum(path.stat().st_size for path in source.files)
    if elements > MAX_ELEMENTS_PER_BYTE * size:
        raise UserError(f"{source.label}: {elements} weights cannot fit into {size} bytes; the file is damaged")


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
