"""How many rounds a stretch has: as few as streaming wants, but enough that starting one costs little beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

SHORT_SECONDS = 0.025  # between the pieces of a reply, while somebody waits for them or for a slot
HOST_ROOM = 1.5  # a stretch takes so many times what the host needs for one, where it is started ahead
FEWEST = 4  # rounds of a stretch that is not in pieces: one of fewer is mostly its own beginning
# For `sys.setswitchinterval`: how long another thread may keep Python from the engine's, and that from the ones which
# take requests and give pieces. The 5 ms that it may otherwise are a few rounds of a small model.
SWITCH_SECONDS = 0.0002
MEMORY = 0.8  # what the seconds of a round, as last seen, still count for after the next stretch


class DeviceTime:
    """Seconds of the engine's thread, in all, that are not its own work: for the device and for learning."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.waited = 0.0  # for what it computes
        self.handed = 0.0  # giving it programs: while its queue is full, it takes the next as fast as it works
        self.learned = 0.0  # turns of the learner

    @property
    def seconds(self) -> float:
        """Of all kinds."""
        return self.waited + self.handed + self.learned

    def read(self, array: jax.Array) -> np.ndarray:
        """What the device gives, once it does."""
        began = self._clock()
        found = np.asarray(array)
        self.waited += self._clock() - began
        return found

    @contextmanager
    def handing(self) -> Iterator[None]:
        """Around giving the device programs."""
        began = self._clock()
        yield
        self.handed += self._clock() - began

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Around a turn of the learner. What is waited for or handed in between counts as that.

        No stretch is made longer for it: the next would have as many updates.
        """
        began, before = self._clock(), self.seconds
        yield
        self.learned += self._clock() - began - (self.seconds - before)


class Pace:
    """Follows how long a round takes from one stretch's end to the next's, the prompts taken in between with it."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic, *, ahead: bool = False):
        """`most`: rounds of a stretch. `ahead`: a stretch is started before the one before it is read."""
        self._most, self._clock, self._ahead = most, clock, ahead
        self._host_seconds = 0.0  # the host's own share of the time from one end to the next
        self._round_seconds: float | None = None
        self._ended: float | None = None  # when the last stretch did, None if the device was idle since

    def rounds(self, *, hurry: bool, least: int = FEWEST) -> int:
        """Of the next stretch, `least` or more; all there may be unless in a `hurry`.

        Ahead, as few as keep the device at work while the host reads the last stretch: starting one costs nothing.
        """
        if self._ahead and self._round_seconds is not None:
            needed = math.ceil(HOST_ROOM * self._host_seconds / self._round_seconds)
            return min(max(needed, least), self._most)
        if not hurry:
            return self._most
        if self._round_seconds is None:
            return least
        return min(max(round(SHORT_SECONDS / self._round_seconds), least), self._most)

    def landed(self, rounds: int, device: float = 0.0) -> None:
        """A stretch of so many rounds has ended; `device`: `DeviceTime.seconds` since the last did."""
        now, before, self._ended = self._clock(), self._ended, self._clock()
        if before is None or not rounds:
            return
        seconds = (now - before) / rounds
        known = seconds if self._round_seconds is None else self._round_seconds
        self._round_seconds = MEMORY * known + (1 - MEMORY) * seconds
        self._host_seconds += (1 - MEMORY) * (now - before - device - self._host_seconds)

    def idle(self) -> None:
        """Nothing is under way."""
        self._ended = None
