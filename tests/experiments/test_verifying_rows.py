"""Rounds of given drafts are rounds: they commit what plain decoding does."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import UserError
from dvi_jax.presets import SHAPES
from experiments import verifying_rows
from experiments.measure import random_model
from experiments.verifying_rows import Pass, began, rounds

OPTIONS = SimpleNamespace(shape="tiny", dtype="float32", prompt=20, new_tokens=40)


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPES["tiny"], "float32", verifying_rows.EXIT_LAYER)


@pytest.mark.parametrize("of", [Pass(1, 1), Pass(4, 1), Pass(3, 2)], ids=str)
def test_what_is_committed(model, of):
    program, knobs = (model.definition, model.decode_params), Knobs.make(of.width - 1, 0.0, ())
    plain = decode_rounds(*program, began(model, of, OPTIONS), knobs, PLAIN)
    found = jax.jit(rounds, static_argnums=0)(*program, began(model, of, OPTIONS), knobs)
    np.testing.assert_array_equal(found.length, plain.length)
    for row, other, length in zip(*map(np.asarray, (found.tokens, plain.tokens, plain.length)), strict=True):
        np.testing.assert_array_equal(row[:length], other[:length])


def test_the_command(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    command = ["verifying_rows", "--dtype", "float32", "--passes", "1x1", "2x3", "--new-tokens", "8", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out)])
    assert verifying_rows.main() == 0
    found = json.loads(out.read_text())["rows"]
    assert [row["pass"] for row in found] == ["1x1", "2x3"]
    assert found[1]["floor_ms"] > found[0]["floor_ms"] > 0  # three sequences have more keys and values
    assert "2x3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["8", "0x1", "1x0", "ax2", "2x", "65x1"])
def test_what_is_no_pass(monkeypatch, text):
    monkeypatch.setattr("sys.argv", ["verifying_rows", "--passes", text])
    with pytest.raises(UserError, match=f"--passes {text}: it must be rows by sequences, such as 6x1, at most 64 rows"):
        verifying_rows.main()
