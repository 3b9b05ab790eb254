"""Acceptance statistics of finished generations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Rounds(Protocol):
    """Anything with one number per round: a `Generation`, a `Trace`."""

    @property
    def accept_lengths(self) -> Sequence[int]:
        """Tokens each round committed."""

    @property
    def drafted(self) -> Sequence[int]:
        """Tokens each round drafted."""


@dataclass(frozen=True)
class Acceptance:
    """How often drafts were accepted.

    `tokens_per_round`: mean accept length. `accept_rate`: accepted / judged drafts, judged being all up to and with the
    first reject. `per_position[j]`: the same for the j-th draft of a round alone. The prefill's token is no round.
    """

    rounds: int
    drafted: int
    judged: int
    accepted: int
    per_position: tuple[float, ...]

    @property
    def accept_rate(self) -> float:
        """Accepted drafts over judged drafts; 0 where nothing was judged."""
        return self.accepted / max(self.judged, 1)

    @property
    def tokens_per_round(self) -> float:
        """Accepted drafts plus the verifier's token, mean over rounds."""
        return 1 + self.accepted / max(self.rounds, 1)


def measure_acceptance(generations: Sequence[Rounds]) -> Acceptance:
    """Statistics over all rounds of `generations`."""
    rounds = [pair for g in generations for pair in zip(g.accept_lengths, g.drafted, strict=True)]
    steps = max((drafted for _, drafted in rounds), default=0)
    per_position = []
    for position in range(steps):
        judged = [accept for accept, drafted in rounds if drafted > position and accept > position]
        passed = sum(accept > position + 1 for accept in judged)
        per_position.append(passed / max(len(judged), 1))
    return Acceptance(
        rounds=len(rounds),
        drafted=sum(drafted for _, drafted in rounds),
        judged=sum(min(drafted, accept) for accept, drafted in rounds),
        accepted=sum(accept - 1 for accept, _ in rounds),
        per_position=tuple(per_position),
    )


def accept_length_histogram(generations: Sequence[Rounds], longest: int) -> list[int]:
    """Rounds per accept length 1..`longest`."""
    counts = Counter(length for g in generations for length in g.accept_lengths)
    return [counts[length] for length in range(1, longest + 1)]


def consecutive_accept_rates(generations: Sequence[Rounds], longest: int) -> list[float | None]:
    """CTAR: of the rounds that drafted at least w tokens, the share whose first w were all accepted; w = 1..`longest`.

    None where no round drafted w. A threshold makes long drafts rarer and surer, so compare at equal thresholds.
    """
    rounds = [pair for g in generations for pair in zip(g.accept_lengths, g.drafted, strict=True)]
    rates: list[float | None] = []
    for window in range(1, longest + 1):
        passed = [accept > window for accept, drafted in rounds if drafted >= window]
        rates.append(sum(passed) / len(passed) if passed else None)
    return rates


def rounds_until(accept_lengths: Sequence[int], tokens: int) -> int:
    """The rounds after which so many tokens were committed."""
    return int(np.searchsorted(np.cumsum([0, *accept_lengths]), tokens))
