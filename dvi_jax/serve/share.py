"""How much of an engine's time learning may take."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_SAVED = 0.02  # seconds of learning that are saved up while there is nothing to learn


class Share:
    """Work of one kind takes at most so large a share of the time, but for the last piece of it.

    While nobody waits, work is free: it is counted, but not against the share.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic):
        """`share`: of the time, work included."""
        self.share, self.spent = share, 0.0  # spent: seconds of work in all
        self._clock, self._saved, self._looked = clock, 0.0, clock()

    def allows(self) -> bool:
        """Whether work may begin now."""
        now = self._clock()
        self._saved = min(self._saved + self.share * (now - self._looked), max(self._saved, MOST_SAVED))
        self._looked = now
        return self._saved >= 0

    def spend(self, seconds: float, *, free: bool) -> None:
        """Work took so long."""
        self.spent += seconds
        if not free:
            self._saved -= seconds
