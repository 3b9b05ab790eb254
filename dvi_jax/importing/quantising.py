"""Streaming named tensors into a base tree whose matrices are kept in fewer bits.

Rows are rounded as they are read, and a file's own integers taken over as they are: what lies in memory beside the
output is a chunk of rows, and the head once in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dvi_jax.errors import UserError, notice
from dvi_jax.identity import BaseHash
from dvi_jax.importing.rounding import rounded
from dvi_jax.importing.tensors import (
    DTYPES,
    Rows,
    Slot,
    TensorSource,
    Tree,
    array_for,
    cast_finite,
    fill,
    put_path,
    row_chunks,
)
from dvi_jax.model.quantised import Quantised
from dvi_jax.quantisation import Quantisation

Path = tuple[str, ...]
HEAD: Path = ("head",)
_BITS = {"int8": 8, "float8": 8, "int4": 4}


@runtime_checkable
class QuantisedSource(Protocol):
    """A `TensorSource` some of whose tensors are integers and scales already."""

    def kept_form(self, name: str) -> tuple[str, int] | None:
        """What tells a tensor's form from others (a name, and its bits); None where integers can't be kept."""

    def kept_chunks(self, name: str) -> Iterator[tuple[Rows, Quantised]]:
        """As `TensorSource.chunks`, but each piece as a `Quantised`."""
        ...


@dataclass
class QuantisedBase:
    """A base tree of quantised matrices, and what became of them."""

    tree: Tree = field(default_factory=dict)
    own: BaseHash = field(default_factory=BaseHash)  # of what the tree stands for
    source: BaseHash = field(default_factory=BaseHash)  # of what was rounded
    forms: Counter[str] = field(default_factory=Counter)  # matrices by what they are kept in

    def add(self, path: Path, array: np.ndarray) -> None:
        """An array that is kept as it is."""
        put_path(self.tree, path, array)
        for digest in (self.own, self.source):
            digest.add("/".join(path), array)

    def add_matrix(self, path: Path, matrix: Quantised, *, is_exact: bool) -> None:
        """A matrix in fewer bits; one that is not the source's to the bit has been added to `source` already."""
        put_path(self.tree, path, matrix.parts())
        self.own.add("/".join(path), matrix)
        if is_exact:
            self.source.add("/".join(path), matrix)
        self.forms[_form(matrix) + (" as in the file" if is_exact else "")] += 1


def load_quantised(source: TensorSource, slots: list[Slot], dtype: str, how: Quantisation, tied: bool) -> QuantisedBase:
    """Read checked `slots`; matrices as `how` says, all else as `dtype`. `tied`: a head is made of the embedding."""
    by_path: dict[Path, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    base = QuantisedBase()
    for path in sorted([*by_path, HEAD] if tied and how.head else by_path):  # the order of hashing
        if path == HEAD and tied:
            embed = base.tree["embed"]
            matrix = _joined(len(embed), ((rows, rounded(embed[rows], how)) for rows in _row_slices(embed)))
            base.add_matrix(path, matrix, is_exact=False)
        elif not how.includes(path):
            array = array_for(by_path[path], DTYPES[dtype])
            for slot in by_path[path]:
                fill(array[slot.rows], source, slot.name)
            base.add(path, array)
        elif _keeps(source, by_path[path], how):
            assert isinstance(source, QuantisedSource)
            base.add_matrix(path, _kept(source, by_path[path]), is_exact=True)
        else:
            base.add_matrix(path, _rounded_slots(source, path, by_path[path], how, base), is_exact=False)
    return base


def report(base: QuantisedBase, label: str) -> None:
    """One line on standard error: how many matrices became what."""
    forms = ", ".join(f"{count} {form}" for form, count in sorted(base.forms.items()))
    notice(f"{label}: matrices are kept in {forms}")


def _form(matrix: Quantised) -> str:
    """Such as `int4 in groups of 64`."""
    if not matrix.is_grouped:
        return "int8" if matrix.values.dtype == np.int8 else "float8"
    return f"{'int4' if matrix.is_packed else 'int8'} in groups of {matrix.group}"


def _keeps(source: TensorSource, slots: list[Slot], how: Quantisation) -> bool:
    """Whether a file has all rows of a matrix in one form of its own, of as many bits as are asked for."""
    if not isinstance(source, QuantisedSource) or how.weights == "float8":
        return False
    forms = {source.kept_form(slot.name) for slot in slots}
    form = forms.pop()
    return not forms and form is not None and form[1] == _BITS[how.weights]


def _kept(source: QuantisedSource, slots: list[Slot]) -> Quantised:
    pieces = ((_numbers(slot)[rows], piece) for slot in slots for rows, piece in source.kept_chunks(slot.name))
    matrix = _joined(slots[-1].rows.stop, pieces)
    if not all(np.isfinite(part).all() for part in matrix[1:] if part is not None):
        raise UserError(f"tensor {slots[0].name} or one joined to it holds NaN or infinite values")
    return matrix


def _rounded_slots(
    source: TensorSource, path: Path, slots: list[Slot], how: Quantisation, base: QuantisedBase
) -> Quantised:
    """Their rows, rounded as they are read, and added to the hash of what was rounded."""
    total, width = slots[-1].rows.stop, slots[0].shape[1]
    # A head like the embedding is none, which is known once it was read.
    whole = np.empty((total, width), DTYPES["bfloat16"]) if path == HEAD else None
    if whole is None:
        base.source.begin("/".join(path), (total, width))

    def pieces() -> Iterator[tuple[np.ndarray, Quantised]]:
        for slot in slots:
            for rows, values in source.chunks(slot.name):
                numbers = _numbers(slot)[rows]
                cast = cast_finite(values, DTYPES["bfloat16"], source, slot.name)
                if whole is not None:
                    whole[numbers] = cast
                else:  # rows of a chunk may be in another order, chunks never are
                    base.source.add_values(cast[np.argsort(numbers)])
                yield numbers, rounded(values, how)

    matrix = _joined(total, pieces())
    if whole is not None:
        base.source.add("head", whole)
    return matrix


def _numbers(slot: Slot) -> np.ndarray:
    """Rows of the joined array that the slot's rows are."""
    return np.arange(slot.start, slot.rows.stop)


def _row_slices(array: np.ndarray) -> Iterator[slice]:
    for start, stop in row_chunks(len(array), array[0].nbytes):
        yield slice(start, stop)


def _joined(total: int, pieces: Iterable[tuple[Any, Quantised]]) -> Quantised:
    """Pieces with the rows that they are, of `total` rows, as one matrix."""
    made: list[Any] = []
    for rows, piece in pieces:
        made = made or [None if part is None else np.empty((total, *part.shape[1:]), part.dtype) for part in piece]
        for target, part in zip(made, piece, strict=True):
            if target is not None:
                target[rows] = part
    return Quantised(*made)


def described(how: Quantisation, base: QuantisedBase) -> Quantisation:
    """What the manifest says of it."""
    return replace(how, source_sha256=base.source.hexdigest())
