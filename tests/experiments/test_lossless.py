"""Speculation against plain decoding on the same devices, and these against one; what does not divide is one line."""

import json

import pytest

from dvi_jax.errors import UserError
from experiments import lossless

SIZES = ("--draft-steps", "2", "--prompt", "8", "--new-tokens", "10")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["lossless", *SIZES, *arguments])
    return lossless.main()


def test_a_mesh_against_one_device(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--shape", "tiny", "--mesh", "model=2", "--out", str(tmp_path / "found.json")) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["equal"]
    assert row["as_one_device"]
    assert set(row["accept_lengths"]) == {"1", "2", "3"}
    assert str(row["accept_lengths"]["3"]) in capsys.readouterr().out


def test_drawn_tokens(monkeypatch, tmp_path):
    found = {}
    for how in ((), ("--temperature", "0.8", "--top-p", "0.9")):
        out = tmp_path / f"{len(how)}.json"
        assert run(monkeypatch, "--shape", "tiny", "--batch", "2", "--trees", "8", *how, "--out", str(out)) == 0
        found[how] = [row["distinct_tokens"] for row in json.loads(out.read_text())["rows"]]
    assert found[()] != found["--temperature", "0.8", "--top-p", "0.9"]


def test_a_difference_is_seen(monkeypatch):
    monkeypatch.setattr(lossless, "same", lambda plain, fast: False)
    assert run(monkeypatch, "--shape", "tiny", "--mesh", "model=2") == 1


@pytest.mark.parametrize(("mesh", "message"), [("data=2", "--batch of 1"), ("model=3", "num_heads 4")])
def test_what_does_not_divide_is_a_line(monkeypatch, mesh, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--shape", "tiny", "--mesh", mesh)
