"""A scripted engine behind a live server, and OpenAI's client in front of it: one of each for a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from dvi_jax.data.tokenizer import Tokenizer
from tests.serve.server.live import Live, live_server, until
from tests.serve.server.scripted import ScriptedEngine


@dataclass
class Scripted:
    """What tests of the server hold."""

    engine: ScriptedEngine
    live: Live
    client: openai.OpenAI
    http: httpx.Client

    def idle(self) -> None:
        """Wait until nothing runs, waits or is open."""
        until(lambda: not (self.engine.running or self.engine.waiting or self.live.serving.open_replies))


@pytest.fixture(scope="session")
def byte_tokenizer(tokenizer_json) -> Tokenizer:
    return Tokenizer(tokenizer_json)


@pytest.fixture(scope="module")
def module_server(byte_tokenizer) -> Iterator[Scripted]:
    engine = ScriptedEngine(byte_tokenizer)
    with (
        live_server(engine, byte_tokenizer, keepalive_seconds=0.2) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Scripted(engine, live, client, http)


@pytest.fixture
def served(module_server) -> Iterator[Scripted]:
    """The module's server, left as it was found: nothing open, nothing paused."""
    yield module_server
    module_server.engine.go()
    module_server.engine.pace = 0.0
    module_server.idle()
