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
    """Tells once, the first time that a program is not on disk and takes longer than `PATIENCE`."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._told = False

    def on_event(self, event: str, **_: Any) -> None:
        """What jax says before it looks a program up, and when it was there."""
        if event == _REQUESTED and not self._told:
            self._stop()
            self._timer = threading.Timer(PATIENCE, self._tell)
            self._timer.daemon = True
            self._timer.start()
        elif event == _FOUND:
            self._stop()

    def on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        """What jax says when a program is compiled."""
        if event == _COMPILED:
            self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        self._told = True
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
