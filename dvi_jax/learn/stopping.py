"""SIGTERM and SIGINT while a run learns: it ends after the running update, with a snapshot."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # as `signal.signal` takes and gives it


class Stopped(SystemExit):
    """The run ended as asked: exit status 143 for SIGTERM, 130 for SIGINT, as shells report them."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopSignals:
    """As a context manager, notes the first signal in `received`; a second one ends the process at once.

    Python hands signals to the main thread alone: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
