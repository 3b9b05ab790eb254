"""Readers of replies, woken by the engine's thread: all of one event loop, or of another process, by one call.

Each call of the system lets another thread have Python, and waits to have it back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary, ref


class Asker(Protocol):
    """Who has something to be told, that was said to it before."""

    def ask(self) -> None:
        """Have all of it told."""


class Waker:
    """Sets the events of one loop from other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = ref(loop), threading.Lock()
        # Not set yet. Weak references: an event holds its loop, which must not outlive its readers for this.
        self._due: list[ref[asyncio.Event]] = []
        self._is_asked = False  # whether it is going to

    def set(self, event: asyncio.Event) -> None:
        """Have the loop set `event`; at the end of `held_back` where that is under way."""
        with self._lock:
            self._due.append(ref(event))
        when_all_is_given(self)

    def ask(self) -> None:
        """Have the loop set what is due; nothing where it is closed, as nobody reads then."""
        with self._lock:
            is_asked, self._is_asked = self._is_asked, True
        loop = self._loop()
        if is_asked or loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._set_all)
        except RuntimeError:  # it is closed
            self._take_due()

    def _set_all(self) -> None:
        for known in self._take_due():
            if (event := known()) is not None:
                event.set()

    def _take_due(self) -> list[ref[asyncio.Event]]:
        with self._lock:
            due, self._due, self._is_asked = self._due, [], False
        return due


class _Thread(threading.local):
    held: set[Asker] | None = None  # that wait for the end of `held_back`


_thread = _Thread()
_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, Waker] = WeakKeyDictionary()


def waker() -> Waker:
    """Of the loop that runs."""
    loop = asyncio.get_running_loop()
    found = _wakers.get(loop)
    if found is None:
        found = _wakers[loop] = Waker(loop)
    return found


def when_all_is_given(asker: Asker) -> None:
    """Have it ask: now, or where `held_back` is under way at the end of that, once."""
    if _thread.held is None:
        asker.ask()
    else:
        _thread.held.add(asker)


@contextmanager
def held_back() -> Iterator[None]:
    """Around what may wake many readers: they are at its end, each loop's together.

    For the calling thread; must not be nested.
    """
    held = _thread.held = set()
    try:
        yield
    finally:
        _thread.held = None
        for one in held:
            one.ask()
