"""One line when a program takes long to compile, so that a first start does not look as if it hung."""

from __future__ import annotations

import threading
from typing import Any

import jax

from dvi_jax.errors import notice

PATIENCE = 2.0  # seconds of compiling before it is told
_REQUESTED = "/jax/compilation_cache/compile_requests_use_cache"
_FOUND = "/jax/compilation_cache/cache_hits"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompilingNotice:
    """Tells once, the first time that a program is not on disk and takes longer than `PATIENCE`.

    Programs may be compiled side by side; jax says of each in the thread that compiles it.
    """

    def __init__(self) -> None:
        self._here = threading.local()  # its `timer`: of the program that this thread compiles
        self._told, self._telling = False, threading.Lock()

    def on_event(self, event: str, **_: Any) -> None:
        """What jax says before it looks a program up, and when it was there."""
        if event == _REQUESTED and not self._told:
            self._stop()
            self._here.timer = threading.Timer(PATIENCE, self._tell)
            self._here.timer.daemon = True
            self._here.timer.start()
        elif event == _FOUND:
            self._stop()

    def on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        """What jax says when a program is compiled."""
        if event == _COMPILED:
            self._stop()

    def _stop(self) -> None:
        timer = getattr(self._here, "timer", None)
        if timer is not None:
            timer.cancel()

    def _tell(self) -> None:
        with self._telling:
            told, self._told = self._told, True
        if not told:
            notice("compiling, which takes some seconds to a minute the first time; the programs are kept")


_notice = CompilingNotice()
_is_listening = False


def tell_when_compiling() -> None:
    """From here on this process says when it compiles; a second call changes nothing."""
    global _is_listening
    if not _is_listening:
        jax.monitoring.register_event_listener(_notice.on_event)
        jax.monitoring.register_event_duration_secs_listener(_notice.on_duration)
        _is_listening = True
