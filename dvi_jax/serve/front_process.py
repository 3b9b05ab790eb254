"""Starting the HTTP process of a server, and staying with it until it ends (`front.py`)."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.serve.desk import Desk
from dvi_jax.serve.link import Link
from dvi_jax.serve.requests import EngineStatus
from dvi_jax.serve.settings import ServerSettings
from dvi_jax.tools import environment_of_child

HANDED_ON = signal.SIGUSR1  # a signal that the engine's process got
OTHERS = (signal.SIGINT, signal.SIGTERM)  # which may come to both: that process hands on what counts
LEARNED = "learned"  # of what `Desk` tells: counters for the metrics alone
TICK_SECONDS = 0.2  # until a signal is seen, at most
END_SECONDS = 10.0  # that the process may take to end once nobody answers it


@dataclass(frozen=True)
class Beginning:
    """What the process is told first: it serves from then on."""

    settings: ServerSettings
    tokenizer: Tokenizer | None
    status: EngineStatus
    sections: dict[str, Any]  # as `Desk.state` has them; `LEARNED` is no part of the server's status
    ends_with_engine: bool  # whether a failed engine ends the server


class FrontProcess:
    """A context manager: begun at once, so that it is there when the model is; leaving it ends the process."""

    def __init__(self, listener: socket.socket):
        """It gets the `listener`, which is closed here: once HTTP ends, nobody is to wait for an answer."""
        self.link, there = Link.pair()
        ends = there.fileno(), listener.fileno()
        # No device: it must not take any of its memory. Its own session: a terminal's Ctrl-C is not for it to show.
        environment = environment_of_child() | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-P", "-m", "dvi_jax.serve.front", *map(str, ends)]
        try:
            self.process = subprocess.Popen(command, pass_fds=ends, env=environment, start_new_session=True)
        except OSError as error:
            raise UserError(f"the server's HTTP process does not start: {error}") from error
        finally:
            there.close()
            listener.close()

    def __enter__(self) -> FrontProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def run(self, desk: Desk, beginning: Beginning) -> int:
        """Have it serve, and answer it until it ends, signals being its own -> its exit status.

        `UserError` if something killed it; raises what kept the desk from answering.
        """
        with self._signals_handed_on(), ThreadPoolExecutor() as threads:
            self.link.send(beginning)
            # Not in this thread: a signal that comes just before a wait without an end is not seen until that ends.
            answering = threads.submit(desk.serve)
            while not answering.done():
                wait([answering], TICK_SECONDS)
            self.link.close()
            status = self.process.wait()
        answering.result()
        if status == -HANDED_ON:  # it had not begun to serve
            return 0
        if status < 0:
            raise UserError(f"the server's HTTP process was ended by {signal.Signals(-status).name}")
        return status

    @contextlib.contextmanager
    def _signals_handed_on(self) -> Iterator[None]:
        def hand_on(number: int, frame: FrameType | None) -> None:
            self.process.send_signal(HANDED_ON)

        before = [signal.signal(number, hand_on) for number in OTHERS]
        try:
            yield
        finally:
            for number, handler in zip(OTHERS, before, strict=True):
                signal.signal(number, handler)
