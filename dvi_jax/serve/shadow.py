"""Whether a drafter that was swapped in is worse than the one before it, by what the verifier says of fresh traffic.

Drafts of one reply are right or wrong together, so single drafts would look more certain than they are. They are
counted in blocks, and what differs between blocks says how much a mean can be trusted.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection
from enum import Enum

BLOCK = 100  # drafts judged
LEAST = 4  # blocks of either drafter before anything is said
ENOUGH = 12  # blocks of a trial that was not found worse: it is over
DOUBT = 3.0  # standard errors of the difference that are not put down to chance


class Verdict(Enum):
    """What a trial comes to."""

    OPEN = "open"
    HELD = "held"  # not worse
    WORSE = "worse"


class Shadow:
    """Accept rates of the drafter that is known to be good, and of what is on trial after it."""

    def __init__(self) -> None:
        self._good: deque[float] = deque(maxlen=2 * ENOUGH)  # accept rate of each of the newest blocks
        self._trial: deque[float] | None = None  # the same since the swap; None: nothing is on trial
        self._seen = (0, 0)  # drafts judged and accepted, up to the block under way

    @property
    def on_trial(self) -> bool:
        """Whether a trial is under way."""
        return self._trial is not None

    @property
    def rates(self) -> tuple[float | None, float | None]:
        """Mean accept rate of the good drafter and of the trial, as far as they are known."""
        return _mean(self._good), _mean(self._trial or ())

    def observe(self, judged: int, accepted: int) -> None:
        """Take in the engine's counters, drafts judged and accepted since its start."""
        more = judged - self._seen[0]
        if more >= BLOCK:
            (self._good if self._trial is None else self._trial).append((accepted - self._seen[1]) / more)
            self._seen = judged, accepted

    def swapped(self, judged: int, accepted: int) -> None:
        """Another drafter is live from here on. What follows it before the verdict is on the same trial."""
        if self._trial is None:
            self._trial, self._seen = deque(maxlen=2 * ENOUGH), (judged, accepted)

    def verdict(self) -> Verdict:
        """What the blocks so far say of the trial."""
        good, trial = self._good, self._trial
        if trial is None or len(trial) < LEAST:
            return Verdict.OPEN
        if len(good) >= LEAST:
            drop = statistics.fmean(good) - statistics.fmean(trial)
            if drop > DOUBT * math.sqrt(_variance(good) + _variance(trial)):
                return Verdict.WORSE
        return Verdict.HELD if len(trial) >= ENOUGH else Verdict.OPEN

    def hold(self) -> None:
        """What was on trial is the good drafter now, by whose rate the next is measured."""
        if self._trial:
            self._good.clear()
            self._good.extend(self._trial)
        self._trial = None

    def take_back(self, judged: int, accepted: int) -> None:
        """The good drafter is live again."""
        self._trial, self._seen = None, (judged, accepted)


def _mean(rates: Collection[float]) -> float | None:
    return statistics.fmean(rates) if rates else None


def _variance(rates: deque[float]) -> float:
    """Of the mean of blocks: at least that of independent drafts."""
    mean = statistics.fmean(rates)
    # Not `statistics.variance`, which computes with fractions: every turn of an engine asks for this.
    spread = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
    return max(spread, mean * (1 - mean) / BLOCK) / len(rates)
