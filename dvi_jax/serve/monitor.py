"""Watching the engine once a second: what it did lately, whether it is stuck, whether drafts are accepted as before."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dvi_jax.serve.logs import say
from dvi_jax.serve.requests import EngineStatus

SECONDS = 600  # of history
RECENT = 60  # seconds that rates are of
WINDOW = 500  # drafts judged between two looks at the accept rate
FRACTION = 0.5  # of the best accept rate, below which there is an alarm


@dataclass(frozen=True)
class Sample:
    """The engine at a moment, and the moment: unix seconds."""

    time: float
    status: EngineStatus


class Monitor:
    """Keeps the last ten minutes of an engine's status; `watch` runs as a task of the event loop."""

    def __init__(self, status: Callable[[], EngineStatus], stuck_seconds: float):
        self._status, self._stuck_seconds = status, stuck_seconds
        self.samples: deque[Sample] = deque(maxlen=SECONDS)
        self.started = time.time()
        self.alarm: str | None = None  # why acceptance is alarming
        self._moved = time.monotonic()  # when work was last seen to go on, or that there was none
        self._best = 0.0  # accept rate of the best window
        self._window = (0, 0)  # drafts judged and accepted before the current one
        self.look()

    async def watch(self) -> None:
        """Look once a second, for ever."""
        while True:
            await asyncio.sleep(1)
            self.look()

    def look(self) -> None:
        """Take a sample."""
        now = self._status()
        before = self.samples[-1].status if self.samples else None
        if before is None or not (now.running or now.waiting) or _progress(now) != _progress(before):
            self._moved = time.monotonic()
        self.samples.append(Sample(time.time(), now))
        self._judge(now)

    def stuck_for(self) -> float | None:
        """Seconds since work last went on, if that is too long; None if all is well."""
        now, seconds = self.samples[-1].status, time.monotonic() - self._moved
        return seconds if (now.running or now.waiting) and seconds > self._stuck_seconds else None

    def _judge(self, now: EngineStatus) -> None:
        """Compare the newest full window of drafts with the best one."""
        totals = sum(now.judged), sum(now.accepted)
        judged, accepted = totals[0] - self._window[0], totals[1] - self._window[1]
        if judged < WINDOW:
            return
        self._window, rate = totals, accepted / judged
        self._best = max(self._best, rate)
        before, self.alarm = self.alarm, None
        if rate < FRACTION * self._best:
            self.alarm = f"drafts are accepted at {rate:.1%}, at best they were at {self._best:.1%}"
        if (before is None) != (self.alarm is None):
            level = logging.WARNING if self.alarm else logging.INFO
            say("acceptance alarm" if self.alarm else "acceptance alarm over", level, accept_rate=rate, best=self._best)

    def recent(self) -> dict[str, Any]:
        """Rates of the last minute; what nothing happened to measure by is None."""
        last = self.samples[-1]
        first = next(sample for sample in self.samples if last.time - sample.time <= RECENT)
        return rates(first, last)


def rates(first: Sample, last: Sample) -> dict[str, Any]:
    """What happened from one sample to the other, as rates."""
    seconds, old, new = last.time - first.time, first.status, last.status
    rounds, tokens = new.rounds - old.rounds, new.new_tokens - old.new_tokens
    judged = _differences(old.judged, new.judged)
    accepted = _differences(old.accepted, new.accepted)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
        "tokens_per_round": tokens / rounds if rounds else None,
        "accept_rate": sum(accepted) / sum(judged) if sum(judged) else None,
        "accept_rate_by_position": [a / j if j else None for a, j in zip(accepted, judged, strict=True)],
    }


def described(status: EngineStatus) -> dict[str, Any]:
    """The status as JSON."""
    about = dataclasses.asdict(status)
    about["last_stretch_age"] = time.monotonic() - about.pop("last_stretch") if status.stretches else None
    return about


def _progress(status: EngineStatus) -> tuple[int, int, int]:
    return status.stretches, status.prompt_tokens, status.new_tokens


def _differences(old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """`new` - `old`, which may have fewer positions."""
    return [value - (old[i] if i < len(old) else 0) for i, value in enumerate(new)]
