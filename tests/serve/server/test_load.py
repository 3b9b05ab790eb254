"""The load generator and the example client against a live server: counts, texts and bounds, no rates."""

from __future__ import annotations

import json
import sys

import pytest

from experiments import client, load
from tests.serve.server.scripted import reply_ids


def command(monkeypatch, module, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    return module.main()


def test_a_closed_loop_with_clients_that_leave(served, monkeypatch, tmp_path):
    """Every finished text is the one its request has alone; who leaves in the middle leaves nothing behind."""
    served.engine.pace = 0.002
    out, before = tmp_path / "load.json", len(served.engine.handles)
    arguments = ["--clients", "6", "--requests", "40", "--max-tokens", "60", "--leave", "0.3", "--check", "8"]
    assert command(monkeypatch, load, "--url", served.live.url, "--out", str(out), *arguments) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["outcomes"]) == {"finished", "left"}
    assert sum(result["outcomes"].values()) == 40
    assert (result["checked"], result["different"]) == (8, 0)
    asked = served.engine.handles[before:]
    assert len(asked) == 48
    whole = [h for h in asked[:40] if h.statistics.new_tokens == len(reply_ids(h.request))]
    assert len(whole) >= result["outcomes"]["finished"]
    assert result["tokens"] <= sum(h.statistics.new_tokens for h in asked[:40])
    served.idle()


def test_more_arrivals_than_can_be_served(served, monkeypatch, tmp_path):
    """What the queue does not hold is refused at once; all that is taken is answered."""
    served.engine.pace = 0.05
    out, before = tmp_path / "load.json", len(served.engine.handles)
    arguments = ["--rate", "2000", "--requests", "60", "--max-tokens", "40", "--temperature", "1"]
    assert command(monkeypatch, load, "--url", served.live.url, "--out", str(out), *arguments) == 0
    outcomes = json.loads(out.read_text(encoding="utf-8"))["outcomes"]
    assert set(outcomes) == {"503", "finished"}
    assert outcomes["503"] + outcomes["finished"] == 60
    assert len(served.engine.handles) - before == outcomes["finished"] >= 12
    served.idle()


def test_a_reply_that_depends_on_company_is_found(served, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "read", _read_wrongly(load.read, asked))
    arguments = ["--url", served.live.url, "--clients", "1", "--requests", "3", "--max-tokens", "8", "--check", "1"]
    assert command(monkeypatch, load, *arguments) == load.DIFFERENT


def _read_wrongly(read, asked):
    async def wrong(answer, one):
        await read(answer, one)
        asked.append(one)
        one.text += "?" * (len(asked) == 4)

    return wrong


def test_the_example_client(served, monkeypatch, capsys):
    url = f"{served.live.url}/v1"
    assert command(monkeypatch, client, "--url", url, "--prompt", "hi", "--max-tokens", "19") == 0
    output = capsys.readouterr()
    assert output.out == "User: hi\nAssistant:"[::-1] + "\n"
    assert output.err == "19 tokens asked, 19 answered in 10 rounds\n"
    lines = iter(["one", "two", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    # The server's address does as well as the API's.
    assert command(monkeypatch, client, "--url", served.live.url, "--max-tokens", "8") == 0
    ids = served.engine.handles[-1].request.prompt_ids
    assert served.engine.tokenizer.decode(ids) == "User: one\nAssistant: :tnatsis\nUser: two\nAssistant:"


@pytest.mark.parametrize(
    ("module", "arguments"), [(client, ["--prompt", "x"]), (load, ["--clients", "1"]), (load, ["--rate", "1"])]
)
def test_no_server_is_one_line(monkeypatch, module, arguments):
    with pytest.raises(client.UserError, match=r"no server answers at http://127\.0\.0\.1:9"):
        command(monkeypatch, module, "--url", "http://127.0.0.1:9", *arguments)
