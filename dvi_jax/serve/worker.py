"""A thread beside an engine's, which does one thing after the other.

As the interpreter ends, a pool of `concurrent.futures` would refuse work while the engine is still to be closed, and
wait for what it does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
_Work = tuple[Future[Any], Callable[[], Any]]


class Worker:
    """Its thread ends when nothing refers to it any more."""

    def __init__(self, name: str):
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        threading.Thread(target=_work_off, args=(self._queue,), name=name, daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Do it after what was asked for before; what it gives or raises is in the future."""
        future: Future[Result] = Future()
        self._queue.put((future, work))
        return future


def _work_off(queue: SimpleQueue[_Work | None]) -> None:
    while (job := queue.get()) is not None:
        future, work = job
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)
        del job, future, work  # while it waits, nothing is kept alive
