"""Whether a drafter that was swapped in is worse than the one before it, by what the verifier says of fresh traffic.

Drafts of one reply are right or wrong together, so single drafts would look more certain than they are. They are
counted in blocks, and what differs between blocks says how much a mean can be trusted. How often drafts are right
depends on the plan too: a tree has several chances where a chain has one. So blocks are of one plan, and compared with
those of the same.
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

_Blocks = dict[str, deque[float]]  # accept rates of the newest blocks of each plan


class Verdict(Enum):
    """What a trial comes to."""

    OPEN = "open"
    HELD = "held"  # not worse
    WORSE = "worse"


class Shadow:
    """Accept rates of the drafter that is known to be good, and of what is on trial after it."""

    def __init__(self) -> None:
        self._good: _Blocks = {}
        self._trial: _Blocks | None = None  # since the swap; None: nothing is on trial
        self._seen = (0, 0)  # drafts judged and accepted, up to the block under way
        self._plan, self._is_mixed = "", False  # what drafted last, and whether something else did in that block

    @property
    def on_trial(self) -> bool:
        """Whether a trial is under way."""
        return self._trial is not None

    @property
    def rates(self) -> tuple[float | None, float | None]:
        """Mean accept rate of the good drafter and of the trial, as far as they are known: of the plan known best."""
        known = self._trial or self._good
        plan = max(known, key=lambda plan: len(known[plan]), default="")
        return _mean(self._good.get(plan, ())), _mean((self._trial or {}).get(plan, ()))

    def observe(self, judged: int, accepted: int, plan: str | None) -> None:
        """Take in the engine's counters, drafts judged and accepted since its start, and the plan that drafts now.

        What was judged since the last look may still have been drafted by the plan before. None: nothing drafts now,
        and what is judged is a try's, by the plan that drafted last.
        """
        if plan is not None:
            self._is_mixed |= self._plan not in ("", plan)
            self._plan = plan
        more = judged - self._seen[0]
        if more < BLOCK:
            return
        if not self._is_mixed:
            blocks = self._good if self._trial is None else self._trial
            blocks.setdefault(self._plan, deque(maxlen=2 * ENOUGH)).append((accepted - self._seen[1]) / more)
        self._seen, self._is_mixed = (judged, accepted), False

    def swapped(self, judged: int, accepted: int) -> None:
        """Another drafter is live from here on. What follows it before the verdict is on the same trial."""
        if self._trial is None:
            self._trial, self._seen, self._is_mixed = {}, (judged, accepted), False

    def verdict(self) -> Verdict:
        """What the blocks so far say of the trial.

        Nothing of a plan by which the good drafter is not known, unless it is known by none: that rounds draft by
        another plan now may be because the new drafter is worse.
        """
        if self._trial is None:
            return Verdict.OPEN
        known = {plan: rates for plan, rates in self._good.items() if len(rates) >= LEAST}
        told = {plan: rates for plan, rates in self._trial.items() if plan in known or not known}
        if known and any(_is_worse(rates, known[plan]) for plan, rates in told.items()):
            return Verdict.WORSE
        return Verdict.HELD if sum(map(len, told.values())) >= ENOUGH else Verdict.OPEN

    def hold(self) -> None:
        """What was on trial is the good drafter now, by whose rate the next is measured."""
        if self._trial:
            self._good = self._trial
        self._trial = None

    def take_back(self, judged: int, accepted: int) -> None:
        """The good drafter is live again."""
        self._trial, self._seen, self._is_mixed = None, (judged, accepted), False


def _is_worse(trial: Collection[float], good: Collection[float]) -> bool:
    """Whether blocks of a trial have a lower rate than those of the good drafter, and not by chance."""
    if len(trial) < LEAST:
        return False
    drop = statistics.fmean(good) - statistics.fmean(trial)
    return drop > DOUBT * math.sqrt(_variance(good) + _variance(trial))


def _mean(rates: Collection[float]) -> float | None:
    return statistics.fmean(rates) if rates else None


def _variance(rates: Collection[float]) -> float:
    """Of the mean of blocks: at least that of independent drafts."""
    mean = statistics.fmean(rates)
    # Not `statistics.variance`, which computes with fractions: every turn of an engine asks for this.
    spread = sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)
    return max(spread, mean * (1 - mean) / BLOCK) / len(rates)
