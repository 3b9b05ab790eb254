"""A server over real sockets, in a thread of the test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.serve.app import create_app
from dvi_jax.serve.desk import Desk, ToldEngine
from dvi_jax.serve.link import Link
from dvi_jax.serve.remote import RemoteEngine
from dvi_jax.serve.requests import RequestEngine
from dvi_jax.serve.running import DrainingServer, address, bind
from dvi_jax.serve.serving import Serving
from dvi_jax.serve.settings import ServerSettings


@dataclass
class Live:
    url: str
    serving: Serving
    server: DrainingServer
    thread: threading.Thread


@contextlib.contextmanager
def live_server(engine: RequestEngine, tokenizer: Tokenizer | None, **settings: object) -> Iterator[Live]:
    listener = bind("127.0.0.1", 0)
    app = create_app(engine, tokenizer, ServerSettings("tiny", **settings))
    server = DrainingServer(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    url = address(listener)
    thread.start()
    try:
        yield Live(url, app.state.serving, server, thread)
    finally:
        engine.close()
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def linked(engine: ToldEngine, tokenizer: Tokenizer | None, **sections: object) -> Iterator[RemoteEngine]:
    """The engine as a server's HTTP process has it, though in the test's own."""
    link, there = Link.pair()
    desk = Desk(engine, link, sections)
    thread = threading.Thread(target=desk.serve, daemon=True)
    thread.start()
    remote = RemoteEngine(Link(there), tokenizer, *desk.state())
    try:
        yield remote
    finally:
        remote.close()
        link.close()
        thread.join(60)
        assert not thread.is_alive()


def until(condition, seconds: float = 60.0) -> None:
    """Wait for what must come soon; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
