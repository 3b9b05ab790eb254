"""The server over the real engine and a tiny model, and the command as users start it."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from dvi_jax import compiling
from dvi_jax.errors import run_cli
from dvi_jax.serve import __main__ as command_line
from dvi_jax.serve.__main__ import main
from tests.compiling import FLAG
from tests.serve.server.live import linked, live_server, until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["of this process", "of another"])
def real(model, make_engine, request):
    with ExitStack() as stack:
        engine = stack.enter_context(make_engine(model))
        if request.param == "of another":
            engine = stack.enter_context(linked(engine, model.tokenizer))
        live = stack.enter_context(live_server(engine, model.tokenizer))
        yield live, stack.enter_context(httpx.Client(base_url=live.url, timeout=60))


def bodies(count):
    """Requests of all kinds; the prompts are printable, so that texts say all."""
    rng = np.random.default_rng(0)
    for index in range(count):
        body = {
            "prompt": "".join(map(chr, rng.integers(33, 127, rng.integers(1, 40)))),
            "max_tokens": int(rng.integers(1, 30)),
            "temperature": float(rng.choice([0, 0, 0.9])),
            "seed": index,
            "n": int(rng.integers(1, 3)),
            "stop": list(map(chr, rng.integers(33, 127, rng.integers(0, 4)))),
        }
        yield {key: value for key, value in body.items() if value != []}


def ask(http, body):
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return [(choice["text"], choice["finish_reason"]) for choice in reply.json()["choices"]], reply.json()["usage"]


def test_replies_do_not_depend_on_company(real):
    live, http = real
    requests = list(bodies(24))
    alone = [ask(http, body) for body in requests]
    assert len({str(choices) for choices, _ in alone}) > 12

    def leave(body):
        with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 50}) as answer:
            next(answer.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, body) for body in requests[::3]]
        together = list(pool.map(lambda body: ask(http, body), requests[::-1]))[::-1]
        for each in leaving:
            each.result()
    assert together == alone
    until(lambda: live.serving.engine.status().running == 0 and live.serving.open_replies == 0)


def test_a_stream_is_the_reply(real):
    _, http = real
    body = {"prompt": "a stream", "max_tokens": 40, "temperature": 0.7, "seed": 5}
    whole, usage = ask(http, body)
    events = http.post("/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}).text
    *chunks, last = [json.loads(line[6:]) for line in events.split("\n\n")[:-2]]
    assert ["".join(chunk["choices"][0]["text"] for chunk in chunks)] == [text for text, _ in whole]
    assert (last["usage"], last["choices"]) == (usage, [])


def test_what_does_not_fit_is_refused_by_the_numbers(real):
    _, http = real
    answer = http.post("/v1/completions", json={"prompt": "x" * 90, "max_tokens": 7})
    assert answer.status_code == 400
    assert "90 tokens and 7 new ones were asked for: this server's context is 96" in answer.json()["error"]["message"]
    assert ask(http, {"prompt": "x" * 90, "max_tokens": 6})[1]["total_tokens"] <= 96
    chat = {"messages": [{"role": "user", "content": "as long as there is room"}], "ignore_eos": True, "temperature": 0}
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["total_tokens"] == 96
    assert http.post("/v1/completions", json={"prompt": [5, 258]}).json()["error"]["message"].startswith("prompt ids")


def test_the_command(byte_checkpoint):
    """Started on a free port; SIGTERM lets the reply finish and the process end well."""
    command = [sys.executable, "-m", "dvi_jax.serve", "--checkpoint", str(byte_checkpoint), "--port", "0"]
    options = ["--slots", "2", "--context", "120", "--plan", "plain", "--model-name", "small", "--api-key", "k"]
    lightly = {**os.environ, FLAG.upper(): "1"}
    with subprocess.Popen([*command, *options], cwd=ROOT, env=lightly, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not (lines and lines[-1].startswith("dashboard: ")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = re.match(r"dashboard: (http://127\.0\.0\.1:\d+)/dashboard", lines[-1]).group(1)
        body = {"model": "small", "prompt": "hello", "max_tokens": 100, "stream": True, "ignore_eos": True}
        headers = {"authorization": "Bearer k"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line.startswith("data"))
            assert '"text"' in next(events)
            process.send_signal(signal.SIGTERM)
            assert list(events)[-1] == "data: [DONE]"
        log = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert process.wait(20) == 0
    (request,) = [line for line in log if line["event"] == "request"]
    assert (request["new_tokens"], request["finish_reasons"], request["status"]) == (100, ["length"], 200)
    assert [line["all_finished"] for line in log if line["event"] == "drained"] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--port", "70000"], "--port must be between 0 (any free one) and 65535, got 70000"),
        (["--slots", "0"], "argument --slots: expected a number of 1 or more"),
        (["--max-queued", "0"], "--max-queued must be at least 1, got 0"),
        (["--drain-seconds", "-1"], "--drain-seconds must be 0 or above, got -1.0"),
        (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid port 0"),
        (["--plan", "sideways"], "sideways"),
        (["--logprobs", "21"], "--logprobs must be between 0 and 20, got 21"),
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_bad_options_are_one_line(byte_checkpoint, monkeypatch, capsys, changes, message):
    arguments = ["--checkpoint", str(byte_checkpoint), "--port", "0", *changes]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(compiling, "PATIENCE", 600.0)  # on a busy machine a note would say that it compiles
    assert run_cli(main) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
        patch.delitem(sys.modules, "dvi_jax.serve.running")
        importlib.reload(command_line)
        patch.setattr(sys, "argv", ["command", "--checkpoint", "x"])
        assert run_cli(command_line.main) == 2
    importlib.reload(command_line)
    assert capsys.readouterr().err == "error: the server needs uvicorn: pip install 'dvi-jax[serve]'\n"
