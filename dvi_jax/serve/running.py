"""A server process: its socket, its event loop, and how signals end it."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import socket
import sys
import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dvi_jax.errors import EXIT_STATUS, INTERRUPTED_STATUS, UserError
from dvi_jax.serve.logs import say
from dvi_jax.serve.pace import SWITCH_SECONDS
from dvi_jax.serve.serving import Serving

LAST_SECONDS = 5  # that connections have to take what was written, once all replies are made
MOST_FILES = 65_536  # open connections are files


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; `UserError` where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen at {host} port {port}: {reason}; choose another --host or --port") from error
    listener.setblocking(False)
    return listener


def address(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn whose first signal drains the engine and then ends the server; a second one ends it at once."""

    def __init__(self, app: Starlette):
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self._serving: Serving = app.state.serving
        self.interrupted = False  # by a second signal
        self.failure: str | None = None  # of an engine that this server ends with

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler, in the main thread."""
        if self._serving.draining:
            self.interrupted = self.force_exit = self.should_exit = True
            return
        self._serving.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, which after a second signal leaves the application's own end out and logs that as an error."""
        self._serving.closing = True  # however it came to this: open dashboards would keep it waiting
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def close_engine(self) -> None:
        """However the server ended."""
        self._serving.engine.close()

    def _drain(self) -> None:
        """Let running replies finish, cut the rest off, and let the event loop end."""
        say("draining", seconds=self._serving.settings.drain_seconds)
        finished = self._serving.engine.drain(self._serving.settings.drain_seconds)
        say("drained", logging.INFO if finished else logging.WARNING, all_finished=finished)
        self._serving.engine.close()
        self.should_exit = True


def settled() -> None:
    """Have this process serve without pauses, now that all is there."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # looking through what compiling has left keeps all replies waiting, for a few tenths of a second


def run(server: DrainingServer, listener: socket.socket) -> int:
    """Serve until a signal ends it, or a failed engine that it ends with; the exit status."""
    with contextlib.suppress(ValueError, OSError):  # as many as this user may have
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    settled()
    try:
        server.run(sockets=[listener])
    finally:
        server.close_engine()
    if server.failure is not None:
        return EXIT_STATUS
    return INTERRUPTED_STATUS if server.interrupted else 0
