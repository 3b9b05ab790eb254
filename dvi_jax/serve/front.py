"""The HTTP process of a server: python -m dvi_jax.serve.front LINK LISTENER, file descriptors that it is born with.

`front_process.py` starts it. It needs no device, and ends when the process that has one does.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.applications import Starlette

from dvi_jax.errors import run_cli
from dvi_jax.serve.app import create_app
from dvi_jax.serve.front_process import HANDED_ON, LEARNED, OTHERS, Beginning
from dvi_jax.serve.learning_metrics import LearningCollector
from dvi_jax.serve.link import Link
from dvi_jax.serve.logs import set_up_logs
from dvi_jax.serve.remote import RemoteEngine
from dvi_jax.serve.running import DrainingServer, run

LAST_TICKS = 20  # tenths of a second in which a server whose engine has failed says so


class FrontServer(DrainingServer):
    """One whose signals come from the engine's process, and which ends when that has gone."""

    def __init__(self, app: Starlette, engine: RemoteEngine, *, ends_with_engine: bool):
        """`ends_with_engine`: as where that has lost other processes, which can only be begun again together."""
        super().__init__(app)
        self._engine, self._ends_with_engine = engine, ends_with_engine
        self._failed_ticks = 0

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second: whether to end.

        At once where nobody answers any more: the address is to be free for the next server. With an engine that says
        that it failed, clients hear of it first, and who asks for the health.
        """
        if (self._ends_with_engine or self._engine.is_lost) and (failure := self._engine.failure):
            self.failure, self._failed_ticks = failure, self._failed_ticks + 1
        return await super().on_tick(counter) or self._engine.is_lost or self._failed_ticks > LAST_TICKS

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's, around all of its serving."""
        signal.signal(HANDED_ON, self.handle_exit)
        try:
            yield
        finally:
            # Not what it was, which kills: one more signal would take the exit status from who ends already.
            signal.signal(HANDED_ON, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> int:
    """Wait to be told what to serve, and serve until a signal or the engine's process ends it."""
    for number in OTHERS:
        signal.signal(number, signal.SIG_IGN)
    link_end, listener_end = map(int, arguments or sys.argv[1:])
    link, listener = Link(socket.socket(fileno=link_end)), socket.socket(fileno=listener_end)
    told = link.receive()
    if told is None:  # nothing came of it
        return 0
    (beginning,) = told
    assert isinstance(beginning, Beginning)
    engine = RemoteEngine(link, beginning.tokenizer, beginning.status, beginning.sections)

    def section(name: str) -> Any:
        return engine.sections[name]

    shown = {name: partial(section, name) for name in beginning.sections if name != LEARNED}
    app = create_app(engine, beginning.tokenizer, beginning.settings, shown)
    if LEARNED in beginning.sections:
        collector = LearningCollector(beginning.settings.model_name, partial(section, LEARNED))
        app.state.serving.metrics.registry.register(collector)
    set_up_logs()
    return run(FrontServer(app, engine, ends_with_engine=beginning.ends_with_engine), listener)


if __name__ == "__main__":
    sys.exit(run_cli(main))
