"""An engine and HTTP in two processes: what one asks the other, and what becomes of either without the other."""

import asyncio
import ctypes
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.errors import UserError
from dvi_jax.serve import remote
from dvi_jax.serve.app import create_app
from dvi_jax.serve.desk import Desk
from dvi_jax.serve.front import LAST_TICKS, FrontServer
from dvi_jax.serve.front_process import HANDED_ON, Beginning, FrontProcess
from dvi_jax.serve.link import Link
from dvi_jax.serve.remote import LOST, RemoteEngine
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import EngineStatus, QueueFullError, Request
from dvi_jax.serve.running import address, bind
from dvi_jax.serve.settings import ServerSettings
from dvi_jax.serve.waking import held_back
from tests.compiling import FLAG
from tests.serve.server.live import linked, live_server, until

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


STATUS = EngineStatus(1, 0, 0, 96, "plain")


@pytest.mark.parametrize("lose", [Link.close, lambda here: here.send("nonsense")])
def test_an_engine_that_is_lost(lose):
    """Whoever waits is told, and who comes later; nothing waits for it, nor for one that is not understood."""
    here, there = Link.pair()
    engine = RemoteEngine(Link(there), None, STATUS, {})

    async def ask():
        waiting = [engine.submit(Request((5,), 3)) for _ in range(2)]
        await asyncio.sleep(0.05)
        lose(here)
        for reply in waiting:
            with pytest.raises(UserError, match=LOST):
                await reply.admitted()
        with pytest.raises(UserError, match=LOST):
            await whole(engine, Request((5,), 3))

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert engine.is_lost
    assert engine.status().failure == LOST
    assert not engine.drain(60)
    engine.close()


def test_an_engine_that_says_nothing_serves_no_more(monkeypatch):
    """Until it speaks again."""
    here, there = Link.pair()
    engine = RemoteEngine(Link(there), None, STATUS, {})
    assert engine.status() == STATUS
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.05)
    until(lambda: (engine.status().failure or "").startswith("its process has said nothing for"))
    monkeypatch.setattr(remote, "SILENT_SECONDS", 60)
    here.send("status", STATUS, {})
    until(lambda: engine.status() == STATUS)
    here.close()


def test_a_failure_that_the_engine_tells_ends_a_server_of_several_processes(monkeypatch):
    """Once clients have heard of it; mere silence makes nothing but the health bad."""
    here, there = Link.pair()
    engine = RemoteEngine(Link(there), None, STATUS, {})
    server = FrontServer(create_app(engine, None, ServerSettings("tiny")), engine, ends_with_engine=True)

    async def ends():
        return [await server.on_tick(1) for _ in range(LAST_TICKS + 1)]

    monkeypatch.setattr(remote, "SILENT_SECONDS", -1)
    assert "has said nothing" in engine.status().failure
    assert not any(asyncio.run(ends()))
    assert server.failure is None
    here.send("status", replace(STATUS, failure="process 1 is gone"), {})
    until(lambda: engine.status().failure == "process 1 is gone")
    assert asyncio.run(ends()) == [False] * LAST_TICKS + [True]
    assert server.failure == "process 1 is gone"
    here.close()


class OneReply:
    """An engine with a single reply, which the test fills."""

    def submit(self, request):
        self.reply = Reply(request, (), None, lambda: None)
        return self.reply

    def status(self):
        return STATUS

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


class Broken(OneReply):
    """One with a defect that some requests find; it answers the others with a token."""

    def submit(self, request):
        if request.max_new_tokens == 13:
            raise ValueError("13 of them")
        if request.max_new_tokens == 14:
            return SimpleNamespace(cancel=lambda: None)  # which tells nothing
        reply = super().submit(request)
        reply.take([70], done=True)
        return reply


DEFECT = "the server failed on this request; its log says why"


def test_a_defect_costs_its_own_request_alone(byte_tokenizer, caplog):
    body = {"prompt": "hello", "max_tokens": 13}
    with (
        linked(Broken(), byte_tokenizer) as remote,
        live_server(remote, byte_tokenizer) as live,
        httpx.Client(timeout=30) as client,  # which would ask again on the same connection
    ):
        url = f"{live.url}/v1/completions"
        broken = client.post(url, json=body)
        assert (broken.status_code, broken.json()["error"]["message"]) == (500, DEFECT)
        (logged,) = [record for record in caplog.records if record.name == "dvi_jax.serve.desk"]
        assert "ValueError: 13 of them" in logging.Formatter().format(logged)
        assert client.post(url, json=body | {"max_tokens": 1}).status_code == 200


def test_a_request_that_cannot_be_sent_costs_itself_alone():
    async def ask(remote):
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            await whole(remote, Request((5,), 1, stop=(lambda: None,)))
        return await whole(remote, Request((5,), 1))

    with linked(Broken(), None) as remote:
        ids, *_ = asyncio.run(asyncio.wait_for(ask(remote), 30))
    assert ids == [70]


def test_a_part_of_the_status_that_fails_keeps_nothing_else_back(caplog):
    """The log says so once; it stays as it was, until it can be told again."""
    engine, parts = OneReply(), [1]
    with linked(engine, None, part=lambda: parts[-1] / len(parts[:2])) as remote:
        assert remote.sections == {"part": 1}
        parts.clear()
        for running in range(3):  # told after it fails
            status = replace(STATUS, running=running)
            engine.status = lambda status=status: status
            until(lambda status=status: remote.status() == status, 30)
        assert remote.sections == {"part": 1}
        assert [record.exc_info[0] for record in caplog.records] == [IndexError]
        parts += [4, 4]
        until(lambda: remote.sections == {"part": 2}, 30)


def test_a_desk_that_tells_no_more_ends():
    engine = OneReply()
    engine.status = lambda: 1 / 0
    here, _there = Link.pair()
    with ThreadPoolExecutor() as pool, closing(here), pytest.raises(ZeroDivisionError):
        pool.submit(Desk(engine, here).serve).result(20)


@contextmanager
def http_process(tokenizer):
    """A server's HTTP process, its address and what it is told first; the test is the engine's process."""
    listener = bind("127.0.0.1", 0)
    url = address(listener)
    with FrontProcess(listener) as front:
        yield front, url, Beginning(ServerSettings("tiny"), tokenizer, STATUS, {}, ends_with_engine=False)


def test_a_defect_in_answering_http_is_no_good_end(byte_tokenizer):
    with http_process(byte_tokenizer) as (front, url, beginning), ThreadPoolExecutor() as pool:
        body = {"prompt": "hello", "max_tokens": 14}
        asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        with pytest.raises(AttributeError, match="tell"):
            front.run(Desk(Broken(), front.link), beginning)
        answer = asked.result()
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, f"the engine failed: {LOST}")
        assert front.process.returncode == 2


def test_a_signal_more_does_not_change_how_it_ends(byte_tokenizer):
    with http_process(byte_tokenizer) as (front, url, beginning):
        front.link.send(beginning)
        httpx.get(f"{url}/health", timeout=60)
        front.process.send_signal(HANDED_ON)
        assert front.link.receive()[0] == "drain"
        front.process.send_signal(HANDED_ON)
        assert front.link.receive() == ("close",)  # nothing is served any more
        front.process.send_signal(HANDED_ON)
        front.link.send("closed")
        assert front.process.wait(60) == 130


def test_open_dashboards_hold_nobody_up(byte_tokenizer):
    """Their streams come to an end, which those that are cut off do not."""
    with http_process(byte_tokenizer) as (front, url, beginning):
        front.link.send(beginning)
        with httpx.stream("GET", f"{url}/dashboard/events", timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            front.link.close()
            list(lines)
        assert front.process.wait(60) == 2


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
