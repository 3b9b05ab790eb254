"""Traces: everything measured about one generation, one line of traces.jsonl each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError

# FASTEST: plain decoding one row wide, where a row among more has other bits and so PLAIN is as wide as SPECULATIVE
PLAIN, SPECULATIVE, FASTEST = "plain", "speculative", "fastest_plain"


@dataclass(frozen=True)
class Trace:
    """One generation. `drafted` and `accept_lengths` hold one number per round.

    The first of `new_ids` comes from the prefill, so `accept_lengths` sum to one less than there are new ids.
    """

    question_id: int | str
    category: str
    turn: int  # from 0
    mode: str  # PLAIN, SPECULATIVE or FASTEST
    ran_first: bool  # of the modes
    prompt_tokens: int
    cache_slots: int
    drafted: list[int]
    accept_lengths: list[int]
    new_ids: list[int]
    finish_reason: str  # "eos" or "length"
    prefill_seconds: float
    seconds: float  # decoding alone

    @property
    def decoded_tokens(self) -> int:
        """Tokens that `seconds` paid for: all but the prefill's."""
        return sum(self.accept_lengths)


@dataclass(frozen=True)
class Turn:
    """The same turn answered in every mode."""

    plain: Trace  # in passes of the same bits as the speculative ones
    speculative: Trace
    narrow: Trace | None = None  # in mode FASTEST; None where `plain` is the fastest plain decoding there is

    @property
    def fastest(self) -> Trace:
        """The fastest plain decoding."""
        return self.narrow or self.plain

    @property
    def identical(self) -> bool:
        """Plain and speculative decoding gave the same ids."""
        return self.plain.new_ids == self.speculative.new_ids

    def first_difference(self) -> int | None:
        """Index of the first new id that differs; None if identical."""
        if self.identical:
            return None
        pairs = zip(self.plain.new_ids, self.speculative.new_ids, strict=False)
        shorter = min(len(self.plain.new_ids), len(self.speculative.new_ids))
        return next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)


class LinesFile:
    """A JSONL file written line by line, each handed to the operating system at once."""

    def __init__(self, path: Path):
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def trace_line(trace: Trace) -> dict[str, Any]:
    """The trace as plain JSON values."""
    return asdict(trace)
