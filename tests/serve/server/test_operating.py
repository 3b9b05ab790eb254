"""Running a server: keys, health, metrics, logs, readers who do not read, signals."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dvi_jax.errors import UserError
from dvi_jax.serve.learned import Learned
from dvi_jax.serve.learning_metrics import LearningCollector
from dvi_jax.serve.logs import JsonLines
from dvi_jax.serve.monitor import Monitor
from dvi_jax.serve.refusals import RefusedError
from dvi_jax.serve.requests import EngineStatus, Request
from dvi_jax.serve.running import bind
from dvi_jax.serve.serving import Serving
from dvi_jax.serve.settings import ServerSettings
from tests.serve.server.live import live_server, until
from tests.serve.server.scripted import ScriptedEngine, ScriptedHandle

ROOT = Path(__file__).parents[3]
BODY = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.fixture
def engine(byte_tokenizer) -> ScriptedEngine:
    return ScriptedEngine(byte_tokenizer)


def test_a_key_is_asked_for(engine, byte_tokenizer):
    with (
        live_server(engine, byte_tokenizer, api_key="secret") as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = http.post("/v1/completions", json=BODY, headers=given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert http.post("/tokenize", json={"prompt": "a"}, headers=given).status_code == 401
        assert engine.handles == []
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="secret") as client:
            assert client.completions.create(model="tiny", **BODY).choices[0].text == "olle"


def sample(text: str, name: str, **labels: str) -> float | None:
    """The value of one series of `/metrics`."""
    wanted = (f"dvi_{name}", {"model_name": "tiny", **labels})
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return next((each.value for each in samples if (each.name, each.labels) == wanted), None)


def test_metrics_move_by_what_was_served(served):
    before = served.http.get("/metrics").text
    served.http.post("/v1/completions", json=BODY)
    served.http.post("/v1/completions", json=BODY | {"stop": "l", "n": 2})
    served.http.post("/v1/completions", json=BODY | {"n": 0})
    served.idle()
    after = served.http.get("/metrics").text

    def moved(name: str, **labels: str) -> float:
        return (sample(after, name, **labels) or 0) - (sample(before, name, **labels) or 0)

    # The first reply has 2 rounds of 2 tokens; in both others "ol" completes the stop at the second token.
    assert moved("prompt_tokens_total") == 15
    assert moved("generation_tokens_total") == 8
    assert moved("spec_decode_num_drafts_total") == 4
    assert moved("spec_decode_num_draft_tokens_total") == 12
    assert moved("spec_decode_num_accepted_tokens_total") == 4
    assert moved("spec_decode_num_accepted_tokens_per_pos_total", position="0") == 4
    assert moved("spec_decode_num_judged_tokens_per_pos_total", position="1") == 4
    assert moved("request_success_total", finished_reason="length") == 1
    assert moved("request_success_total", finished_reason="stop") == 2
    assert moved("http_responses_total", status="200") >= 2
    assert moved("http_responses_total", status="400") == 1
    assert moved("time_to_first_token_seconds_count") == moved("e2e_request_latency_seconds_count") == 2
    assert moved("request_queue_time_seconds_count") == moved("request_tokens_per_round_count") == 3
    assert moved("inter_token_latency_seconds_count") == 2
    assert (sample(after, "slots"), sample(after, "num_requests_running")) == (4, 0)


def test_what_the_docs_and_grafana_read_is_there(served):
    served.http.post("/v1/completions", json=BODY)
    served.idle()
    there = set(re.findall(r"^(dvi_\w+)\{", served.http.get("/metrics").text, re.MULTILINE))
    board = (ROOT / "docs" / "serving" / "grafana.json").read_text(encoding="utf-8")
    shown = set(re.findall(r"dvi_\w+", board)) - {"dvi_jax"}
    registry = CollectorRegistry()
    registry.register(LearningCollector("tiny", Learned))
    learning = set(re.findall(r"^(dvi_\w+)\{", generate_latest(registry).decode(), re.MULTILINE))
    assert len(shown & there) >= 10
    assert shown & learning == {name for name in learning if not name.endswith(("_created", "_update_seconds"))}
    assert shown <= there | learning
    table = (
        (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("behind `dvi_`")[2].partition("\n\n")[0]
    )
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = {f"dvi_{name}" for cell in first for name in re.findall(r"`(\w+)", cell)}
    histograms = {name.removesuffix("_bucket") for name in there if name.endswith("_bucket")}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}
    written = {name for name in there if not name.endswith("_created")} - parts | histograms
    assert named == written


def test_a_thousand_idle_connections_hold_nobody_up(served):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # both ends are in this process
    try:
        with ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(("127.0.0.1", port_of(served.live.url))))
            assert httpx.post(f"{served.live.url}/v1/completions", json=BODY, timeout=20).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_status_for_scripts(served):
    served.http.post("/v1/completions", json=BODY)
    status = served.http.get("/v1/dvi/status").json()
    assert (status["model"], status["health"], status["alarm"]) == ("tiny", "ok", None)
    assert (status["engine"]["slots"], status["engine"]["plan"]) == (4, "chain:3")
    assert status["engine"]["last_stretch_age"] < 20
    assert {"tokens_per_second", "tokens_per_round", "accept_rate_by_position"} <= set(status["recent"])


def test_a_request_is_one_line_in_the_log_without_its_text(served, caplog):
    caplog.set_level(logging.INFO, "dvi_jax.serve")
    answer = served.http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    forged = served.http.post("/v1/completions", json=BODY, headers={"x-request-id": "a b\tc"})
    assert forged.headers["x-request-id"].startswith("req-")
    until(lambda: len(caplog.records) == 2)
    lines = [JsonLines().format(record) for record in caplog.records]
    assert not any("hello" in line or "olle" in line or "\n" in line for line in lines)
    (line,) = [json.loads(line) for line in lines if "mine-1" in line]
    assert (line["event"], line["level"], line["path"], line["status"]) == ("request", "info", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["new_tokens"], line["rounds"]) == (5, 4, 2)
    assert (line["finish_reasons"], line["left"], line["stream"]) == (["length"], False, False)
    assert 0 <= line["queue_seconds"] <= line["first_text_seconds"] <= line["seconds"]


def test_who_reads_nothing_loses_the_reply_and_holds_no_slot(engine, byte_tokenizer):
    """Log-probabilities make a reply larger than what a connection may hold."""
    with live_server(engine, byte_tokenizer, write_seconds=0.3) as live:
        body = json.dumps(BODY | {"max_tokens": 500, "logprobs": 3, "n": 40, "stream": True}).encode()
        engine.max_waiting = 40
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port_of(live.url)))
            client.sendall(HEAD % len(body) + body)
            until(lambda: live.serving.open_replies == 40)
            until(lambda: live.serving.open_replies == 0 and not engine.running and not engine.waiting)
        until(
            lambda: sample(httpx.get(f"{live.url}/metrics").text, "request_success_total", finished_reason="cancelled")
        )
        assert httpx.post(f"{live.url}/v1/completions", json=BODY, timeout=60).status_code == 200


def test_who_waits_to_be_queued_is_open(byte_tokenizer, monkeypatch):
    """As with an engine in another process; who leaves, or is refused, is not."""
    engine, told = ScriptedEngine(byte_tokenizer, slots=1), asyncio.Event()
    serving = Serving(engine, byte_tokenizer, ServerSettings("tiny", max_queued=1))
    asked = [Request((5,), 1)] * 2
    monkeypatch.setattr(ScriptedHandle, "admitted", lambda _: told.wait())

    async def ask():
        waiting = [asyncio.create_task(serving.submit(asked)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="too many requests are open"):
            serving.check_open()
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        serving.check_open()
        with pytest.raises(RefusedError, match="at most 19 alternatives"):
            await serving.submit([Request((5,), 1, logprobs=20)] * 2)
        told.set()
        serving.release(await waiting[1])
        assert serving.open_replies == 0

    asyncio.run(ask())
    engine.close()


def test_a_body_that_does_not_come(engine, byte_tokenizer):
    with (
        live_server(engine, byte_tokenizer, body_seconds=0.2) as live,
        socket.create_connection(("127.0.0.1", port_of(live.url))) as client,
    ):
        client.sendall(HEAD % 9 + b"{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def status_of(**changes: object) -> EngineStatus:
    return replace(EngineStatus(4, 0, 0, 512, "chain:3"), **changes)


def test_a_device_loop_that_is_stuck(monkeypatch):
    """Only work that does not go on is stuck: an idle engine is not, nor one that takes prompts in."""
    now, status = 1000.0, status_of()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = Monitor(lambda: status, stuck_seconds=60)
    steps = [
        (100, {}, None),
        (0, {"running": 1}, None),
        (50, {"running": 1}, None),
        (50, {"running": 1, "prompt_tokens": 64}, None),
        (50, {"running": 1, "prompt_tokens": 64, "stretches": 1}, None),
        (61, {"running": 1, "prompt_tokens": 64, "stretches": 1}, 61),
        (1, {"running": 1, "prompt_tokens": 64, "stretches": 2}, None),
        (61, {"waiting": 1, "prompt_tokens": 64, "stretches": 2}, 61),
    ]
    for seconds, changes, expected in steps:
        now += seconds
        status = status_of(**changes)
        monitor.look()
        assert monitor.stuck_for() == expected, changes


def test_an_alarm_when_drafts_are_accepted_far_less_than_before(caplog):
    status = status_of()
    monitor, judged, accepted = Monitor(lambda: status, 60), 0, 0
    for rate, alarm in (
        (0.3, None),
        (0.6, None),
        (0.35, None),
        (0.25, "25.0%, at best they were at 60.0%"),
        (0.5, None),
    ):
        judged, accepted = judged + 1000, accepted + int(1000 * rate)
        status = status_of(judged=(judged,), accepted=(accepted,))
        monitor.look()
        assert (monitor.alarm is None) if alarm is None else monitor.alarm.endswith(alarm)
    assert monitor.samples[-1].status.judged == (5000,)


def test_health_says_what_is_wrong(engine, byte_tokenizer):
    with (
        live_server(engine, byte_tokenizer, stuck_seconds=0.1) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        assert http.get("/health").json() == {"status": "ok"}
        engine.pause()
        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}):
            until(lambda: http.get("/health").status_code == 503)
            assert "the device loop is stuck" in http.get("/health").json()["status"]
            engine.go()
            until(lambda: http.get("/health").status_code == 200)


def test_draining(engine, byte_tokenizer):
    """What runs finishes; what is new is told to come back."""
    engine.pace = 0.05
    with live_server(engine, byte_tokenizer) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 40, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert "ol" in next(lines)
            engine.pause()
            live.server.handle_exit(signal.SIGTERM, None)
            refused = httpx.post(f"{live.url}/v1/completions", json=BODY, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{live.url}/health", timeout=60).status_code == 503
            engine.go()
            *rest, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert sum(len(json.loads(line[6:])["choices"][0]["text"]) for line in rest) == 38
        live.thread.join(60)
        assert not live.thread.is_alive()
        assert not live.server.interrupted


def test_draining_ends_when_patience_does(engine, byte_tokenizer):
    with (
        live_server(engine, byte_tokenizer, drain_seconds=0.2) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        engine.pause()
        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            live.server.handle_exit(signal.SIGTERM, None)
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cut_off"
        live.thread.join(60)
        assert not live.thread.is_alive()


def test_a_second_signal_ends_it_at_once(engine, byte_tokenizer, caplog):
    with live_server(engine, byte_tokenizer) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        engine.pause()
        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}):
            live.server.handle_exit(signal.SIGTERM, None)
            assert live.serving.health() == "the server is shutting down"
            live.server.handle_exit(signal.SIGTERM, None)
            live.thread.join(60)
        assert not live.thread.is_alive()
        assert live.server.interrupted
    assert "in lifespan" not in caplog.text  # the application was ended, not cut off


def test_an_address_in_use_is_one_line(module_server):
    port = port_of(module_server.live.url)
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1 port {port}: Address already in use"):
        bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen at nowhere\.invalid"):
        bind("nowhere.invalid", 0)
