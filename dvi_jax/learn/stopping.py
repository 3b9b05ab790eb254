"""SIGTERM and SIGINT during a run: while it learns it ends after the running update, with a snapshot; else at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dvi_jax.processes import is_first

STOPPING = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # as `signal.signal` takes and gives it


class Stopped(SystemExit):
    """The run ended as asked: exit status 143 for SIGTERM, 130 for SIGINT, as shells report them."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class StopSignals:
    """As a context manager, makes the first signal raise `Stopped`; a second one ends the process at once.

    While `held` it is only noted in `received`: whoever holds it, looks there and ends in its own time. Python hands
    signals to the main thread alone: elsewhere this does nothing, nor in another process than the first of several.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_held = False
        self._earlier: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread() and is_first():
            self._earlier = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For as long as there is something that must not be left half done."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if not self._is_held:
            raise Stopped(number)
