"""What the server refuses: by name, in OpenAI's shape, and never by failing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dvi_jax.data.tokenizer import Tokenizer
from experiments.fuzz.bodies import cases, fault
from tests.serve.server.live import live_server
from tests.serve.server.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: "),
        ({"messages": None}, "messages", "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, None, "context is 512 tokens"),
        ({"max_tokens": 511}, "max_tokens", "511 new ones were asked for: this server's context is 512 tokens"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "at most 64 replies"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "1 to 1000 characters"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 20}, None, "at most 19 alternatives"),  # the engine's own words
        ({"tools": [TOOL]}, "tools", "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"presence_penalty": -1}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ],
)
def test_bad_fields(served, changes, param, message):
    answer = served.http.post("/v1/chat/completions", json=CHAT | changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_fields_that_ask_for_nothing_and_unknown_ones_are_no_obstacle(served):
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "logit_bias": None,
        "user": "somebody",
        "a_field_of_tomorrow": {"x": 1},
        "temperature": None,
        "stop": None,
    }
    assert served.http.post("/v1/chat/completions", json=CHAT | harmless).status_code == 200


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [1, "a"], [True], 5, [[5], "a"], {"a": 1}])
def test_bad_prompts(served, prompt):
    answer = served.http.post("/v1/completions", json={"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_another_model(served):
    answer = served.http.post("/v1/chat/completions", json=CHAT | {"model": "gpt-x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/health", 405)],
)
def test_unknown_routes(served, method, path, status):
    answer = served.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_json_or_not_declared_so(served):
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"messages": NaN}', b'"\\ud800"'):
        answer = served.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content[:20]
    undeclared = served.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert undeclared.status_code == 415


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_ten_megabytes(served, declared):
    """Refused in a line that its sender gets to read, whether its length was declared or not."""
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    content = body if declared else iter([body[i : i + 100_000] for i in range(0, len(body), 100_000)])
    answer = served.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body is larger than 2097152 bytes"


def test_damaged_and_invented_bodies(served):
    """`python -m experiments.fuzz.bodies` sends as many as one likes."""
    statuses = set()
    for number, case in enumerate(cases(seed=0, first=0, count=400)):
        answer = served.http.post(case.path, content=case.content, headers=case.headers)
        assert fault(answer) is None, (number, answer.text)
        statuses.add(answer.status_code)
    assert {200, 400, 404, 415} <= statuses
    served.idle()


def test_a_hostile_template_costs_its_own_requests_alone(tokenizer_json):
    """It runs into its limits, which is one line; meanwhile others are answered."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Tokenizer(tokenizer_json, loop)
    with live_server(ScriptedEngine(tokenizer), tokenizer) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        with ThreadPoolExecutor() as pool:
            hostile = [pool.submit(http.post, "/v1/chat/completions", json=CHAT) for _ in range(2)]
            assert http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
            answers = [each.result() for each in hostile]
        for answer in answers:
            assert answer.status_code == 400
            assert "the chat template failed: it ran over its limits" in answer.json()["error"]["message"]
