"""Comparing two implementations: how far stage tensors are apart, and the first token or round that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from conversion.parity.runs import STAGES, Decoded, Implementation, Reference, Stages

TOLERANCE = 2e-4
IDS, ACCEPT_LENGTHS, DRAFTED = "generated ids", "accept lengths", "drafts per round"


@dataclass(frozen=True)
class Place:
    """An element of a stage tensor: prompt number (from 1), position in it, index in the row."""

    prompt: int
    position: int
    index: int


@dataclass(frozen=True)
class Mismatch:
    """The first difference of one decoded prompt. Round 0 is the prefill, `position` counts from the prompt's start."""

    prompt: int
    round: int
    position: int
    what: str
    expected: int | None  # None: this side had ended
    found: int | None


@dataclass
class Row:
    """One line of the report: a stage of one implementation against another's, over all prompts.

    Tensors fill `absolute`, `relative` (to the largest magnitude in the same row) and `place` (of `absolute`); exact
    stages fill `mismatch`.
    """

    stage: str
    name: str
    against: str
    prompts: int = 0
    equal: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    place: Place | None = None
    mismatch: Mismatch | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the stage allows no difference at all."""
        return self.stage in (IDS, ACCEPT_LENGTHS, DRAFTED)

    @property
    def agrees(self) -> bool:
        """Whether every prompt was within the tolerance."""
        return self.equal == self.prompts

    def add_tensors(self, prompt: int, expected: np.ndarray, found: np.ndarray) -> None:
        """Take in one prompt's tensors [T, X]."""
        absolute, relative, position, index = largest_difference(expected, found)
        self.prompts += 1
        self.equal += absolute <= TOLERANCE
        self.relative = max(self.relative, relative)
        if self.place is None or absolute > self.absolute:
            self.absolute, self.place = absolute, Place(prompt, position, index)

    def add_mismatch(self, mismatch: Mismatch | None) -> None:
        """Take in one decoded prompt's outcome."""
        self.prompts += 1
        self.equal += mismatch is None
        self.mismatch = self.mismatch or mismatch


def largest_difference(expected: np.ndarray, found: np.ndarray) -> tuple[float, float, int, int]:
    """(largest absolute difference, largest one relative to its row's magnitude, row and index of the first).

    Another shape, and a number that is not finite, count as an infinite difference.
    """
    if expected.shape != found.shape:
        return float("inf"), float("inf"), 0, 0
    difference = np.abs(expected.astype(np.float64) - found)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    position, index = np.unravel_index(difference.argmax(), difference.shape)
    scale = np.maximum(np.abs(expected).max(axis=1), np.finfo(np.float32).tiny)
    return float(difference.max()), float((difference.max(axis=1) / scale).max()), int(position), int(index)


@dataclass
class Comparison:
    """The rows of a report, in the order of their first use."""

    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)

    def row(self, stage: str, name: str, against: str) -> Row:
        """The line for this stage and pair, made when first asked for."""
        return self.rows.setdefault((stage, name, against), Row(stage, name, against))

    @property
    def agrees(self) -> bool:
        """Whether every line does."""
        return all(row.agrees for row in self.rows.values())

    @property
    def first_mismatch(self) -> tuple[Row, Mismatch] | None:
        """The decoded difference that comes first by prompt, round and position, with its line."""
        found = [(row, row.mismatch) for row in self.rows.values() if row.mismatch is not None]
        return min(found, key=lambda pair: (pair[1].prompt, pair[1].round, pair[1].position), default=None)

    def add_stages(self, prompt: int, expected: Stages, others: dict[str, Stages]) -> None:
        """Every stage that an implementation has, against the reference's."""
        for key, stage in STAGES.items():
            for name, stages in others.items():
                if key in stages:
                    self.row(stage, name, Reference.name).add_tensors(prompt, expected[key], stages[key])

    def add_decoded(
        self, prompt: int, length: int, decoded: dict[str, Decoded], implementations: Sequence[Implementation]
    ) -> None:
        """A prompt of `length` tokens decoded by all: ids, accept lengths and drafts against the reference's."""
        expected = decoded[Reference.name]
        rounds = expected.accept_lengths or []
        for other in implementations:
            found = decoded[other.name]
            ids = first_id_mismatch(prompt, length, expected, found, same_end=other.same_end)
            self.row(IDS, other.name, Reference.name).add_mismatch(ids)
            for what, wanted, given in (
                (ACCEPT_LENGTHS, expected.accept_lengths, found.accept_lengths),
                (DRAFTED, expected.drafted, found.drafted),
            ):
                if given is not None:
                    mismatch = first_round_mismatch(
                        prompt, length, what, rounds, wanted or [], given, same_end=other.same_end
                    )
                    self.row(what, other.name, Reference.name).add_mismatch(mismatch)
        if "hf" in decoded and "jax" in decoded:  # both decode to the end, which the reference may not reach
            ends = first_id_mismatch(prompt, length, decoded["hf"], decoded["jax"], same_end=True)
            self.row(IDS, "jax", "hf").add_mismatch(ends)


def round_of(position: int, length: int, accept_lengths: Sequence[int] | None) -> int:
    """The round that committed `position` after a prompt of `length` tokens: 0 for the prefill's token."""
    end = length
    for number, accepted in enumerate(accept_lengths or [], 1):
        if position <= end:
            return number - 1
        end += accepted
    return len(accept_lengths or []) + (position > end)


def first_id_mismatch(
    prompt: int, length: int, expected: Decoded, found: Decoded, *, same_end: bool
) -> Mismatch | None:
    """The first id that differs; with `same_end` also where one side is longer, else only where `found` is shorter."""
    for position in range(max(len(expected.output_ids), len(found.output_ids))):
        wanted, given = _at(expected.output_ids, position), _at(found.output_ids, position)
        if wanted != given and (same_end or wanted is not None):
            number = round_of(position, length, expected.accept_lengths or found.accept_lengths)
            return Mismatch(prompt, number, position, IDS, wanted, given)
    return None


def first_round_mismatch(
    prompt: int,
    length: int,
    what: str,
    accept_lengths: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    *,
    same_end: bool,
) -> Mismatch | None:
    """The first round whose number differs; `accept_lengths`, the reference's, tell where the round begins."""
    for index in range(max(len(expected), len(found))):
        wanted, given = _at(expected, index), _at(found, index)
        if wanted != given and (same_end or wanted is not None):
            position = length + 1 + sum(accept_lengths[:index])
            return Mismatch(prompt, index + 1, position, what, wanted, given)
    return None


def stop_at_first_token(length: int, decoded: dict[str, Decoded]) -> dict[str, Decoded]:
    """The results if all checked the prefill's token against eos, as JAX does and the original does not."""
    return {
        name: result
        if name == "jax"
        else Decoded(result.output_ids[: length + 1], *(_emptied(result.accept_lengths, result.drafted)))
        for name, result in decoded.items()
    }


def _emptied(*lists: list[int] | None) -> list[list[int] | None]:
    return [None if values is None else [] for values in lists]


def _at(values: Sequence[int], index: int) -> int | None:
    return values[index] if index < len(values) else None
