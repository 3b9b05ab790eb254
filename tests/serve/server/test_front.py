"""An engine and HTTP in two processes: what one asks the other, and what becomes of either without the other."""

import asyncio
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.errors import UserError
from dvi_jax.serve import remote
from dvi_jax.serve.link import Link
from dvi_jax.serve.remote import LOST, RemoteEngine
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import EngineStatus, QueueFullError, Request
from dvi_jax.serve.waking import held_back
from tests.compiling import FLAG
from tests.serve.server.live import linked, until

ROOT = Path(__file__).parents[3]


async def whole(engine, request):
    """Ids, text, finish reason, log-probabilities and statistics of a reply."""
    reply = engine.submit(request)
    await reply.admitted()
    pieces = [piece async for piece in reply.stream()]
    ids = [token for piece in pieces for token in piece.ids]
    logprobs = [each for piece in pieces for each in piece.logprobs or ()]
    return ids, "".join(piece.text for piece in pieces), pieces[-1].finish_reason, logprobs, reply.statistics


def asked(count):
    rng = np.random.default_rng(0)
    for seed in range(count):
        prompt = tuple(rng.integers(35, 120, rng.integers(1, 30)).tolist())
        sampling = SamplingConfig(temperature=float(rng.choice([0, 0.9])), seed=seed)
        stop = ("a", "bc") if seed % 3 == 0 else ()
        logprobs = 2 if seed % 4 == 0 else None
        yield Request(prompt, int(rng.integers(1, 40)), sampling, eos_ids=(), stop=stop, logprobs=logprobs)


def test_replies_are_those_of_the_engine(model, make_engine):
    """All of them side by side; statistics too, but for the times."""
    counts = ("prompt_tokens", "new_tokens", "rounds", "drafted", "accepted")

    async def all_of(engine):
        return await asyncio.gather(*(whole(engine, request) for request in asked(24)))

    def without_times(found):
        return [(*rest, [getattr(statistics, name) for name in counts]) for *rest, statistics in found]

    with make_engine(model, logprobs=2) as engine:
        own = asyncio.run(all_of(engine))
        with linked(engine, model.tokenizer, learned=lambda: 7) as remote:
            found = asyncio.run(all_of(remote))
            until(lambda: remote.status().running == 0)
            assert remote.status().new_tokens == engine.status().new_tokens
            assert remote.sections == {"learned": 7}
    assert without_times(found) == without_times(own)
    assert all(text for _, text, reason, *_ in own if reason == "length")
    for *_, statistics in found:
        assert 0 < statistics.submitted <= statistics.started <= statistics.first_token <= statistics.finished


def test_what_the_engine_refuses_is_refused(model, make_engine):
    async def refusals(engine):
        replies, found = [], []
        for request in [Request((5,), 1000), *[Request((5, 6), 80, eos_ids=())] * 9]:  # three at most can be there
            replies.append(engine.submit(request))
            try:
                await replies[-1].admitted()
            except UserError as error:
                found.append(error)
        for reply in replies:
            reply.cancel()
        return found

    with make_engine(model, slots=1, max_waiting=2) as engine, linked(engine, model.tokenizer) as remote:
        large, full, *_ = asyncio.run(refusals(remote))
    assert isinstance(full, QueueFullError)
    assert (full.waiting, str(full)) == (2, "2 requests are waiting, which is as many as may")
    assert full.retry_after >= 1
    assert "1000 new ones were asked for" in str(large)


def test_who_leaves_frees_the_slot(model, make_engine):
    async def leave(engine):
        reply = engine.submit(Request((5, 6), 90, eos_ids=()))
        async for _ in reply.stream():
            break
        await whole(engine, Request((5, 6), 2, eos_ids=()))

    with make_engine(model, slots=1) as engine, linked(engine, model.tokenizer) as remote:
        asyncio.run(leave(remote))
        until(lambda: not engine._scheduler.is_busy)
        assert engine.status().new_tokens < 92
        assert remote.drain(60)
        with pytest.raises(UserError, match="takes no more requests"):
            asyncio.run(whole(remote, Request((5, 6), 2)))


def test_an_engine_that_is_lost():
    """Whoever waits is told, and who comes later; nothing waits for it."""
    here, there = Link.pair()
    engine = RemoteEngine(Link(there), None, EngineStatus(1, 0, 0, 96, "plain"), {})

    async def lose():
        waiting = [engine.submit(Request((5,), 3)) for _ in range(2)]
        await asyncio.sleep(0.05)
        here.close()
        for reply in waiting:
            with pytest.raises(UserError, match=LOST):
                await reply.admitted()
        with pytest.raises(UserError, match=LOST):
            await whole(engine, Request((5,), 3))

    asyncio.run(lose())
    assert engine.is_lost
    assert engine.status().failure == LOST
    assert not engine.drain(60)
    engine.close()


def test_an_engine_that_says_nothing_serves_no_more(monkeypatch):
    """Until it speaks again."""
    here, there = Link.pair()
    status = EngineStatus(1, 0, 0, 96, "plain")
    engine = RemoteEngine(Link(there), None, status, {})
    assert engine.status() == status
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.05)
    until(lambda: (engine.status().failure or "").startswith("its process has said nothing for"))
    monkeypatch.setattr(remote, "SILENT_SECONDS", 60)
    here.send("status", status, {})
    until(lambda: engine.status() == status)
    here.close()


class OneReply:
    """An engine with a single reply, which the test fills."""

    def submit(self, request):
        self.reply = Reply(request, (), None, lambda: None)
        return self.reply

    def status(self):
        return EngineStatus(1, 0, 0, 96, "plain")

    def drain(self, seconds):
        return True

    def close(self):
        pass


def test_a_reply_that_fails_gives_what_it_had():
    """Tokens that were not told yet, and the failure that came right behind them."""
    engine, found = OneReply(), []

    async def read(remote):
        reply = remote.submit(Request((5, 6), 80))
        await reply.admitted()
        with held_back():
            engine.reply.take([7], done=False)
            engine.reply.fail("it broke")
        async for piece in reply.stream():
            found.append(piece.ids)

    with linked(engine, None) as remote, pytest.raises(UserError, match="it broke"):
        asyncio.run(asyncio.wait_for(read(remote), 60))
    assert found == [(7,)]


@contextmanager
def started(checkpoint):
    """The command, its address, and the id of its HTTP process."""
    command = [sys.executable, "-m", "dvi_jax.serve", "--checkpoint", str(checkpoint), "--port", "0"]
    options = ["--slots", "2", "--context", "128", "--plan", "plain", "--model-name", "small"]
    lightly = {**os.environ, FLAG.upper(): "1"}
    with subprocess.Popen([*command, *options], cwd=ROOT, env=lightly, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not (lines and lines[-1].startswith("dashboard: ")):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process, re.search(r"http://[\d.:]+", lines[-1]).group(), int(child)
        finally:
            process.kill()


BODY = {"model": "small", "prompt": "hello", "max_tokens": 100, "stream": True, "ignore_eos": True}


def test_without_the_engine_http_ends(byte_checkpoint):
    """Clients are told, and the address is free for the next server."""
    with started(byte_checkpoint) as (process, url, child):
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, process.kill).start()
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, f"the engine failed: {LOST}")
        until(lambda: not Path(f"/proc/{child}").exists())
        host, port = re.match(r"http://([\d.]+):(\d+)", url).groups()
        socket.create_server((host, int(port))).close()


def test_without_http_the_engine_ends(byte_checkpoint):
    with started(byte_checkpoint) as (process, url, child):
        httpx.get(f"{url}/health", timeout=60)
        os.kill(child, signal.SIGKILL)
        assert process.wait(60) == 2
        assert process.stderr.read().splitlines()[-1] == "error: the server's HTTP process was ended by SIGKILL"


def test_a_signal_that_comes_to_both_is_one(byte_checkpoint):
    """As a service manager sends it; the reply under way finishes."""
    with started(byte_checkpoint) as (process, url, child):
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line.startswith("data"))
            next(events)
            for number in (child, process.pid):
                os.kill(number, signal.SIGTERM)
            assert list(events)[-1] == "data: [DONE]"
        assert process.wait(60) == 0


def test_a_signal_is_seen_whichever_thread_gets_it(byte_checkpoint):
    """Python runs handlers in the main thread alone, which another thread's signal does not wake."""
    with started(byte_checkpoint) as (process, url, _):
        httpx.get(f"{url}/health", timeout=60)
        threads = (int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir())
        other = next(thread for thread in threads if thread != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
        assert process.wait(60) == 0
