"""The speed suite: its cases fit, its floors are the bytes they say, its findings the ratios asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import start
from dvi_jax.decode.state import Knobs
from dvi_jax.presets import TINY
from experiments import speed
from experiments.measure import Floor, abstract_model, compile_decode, filled_state, floor_of, random_model, time_decode
from experiments.speed_suite import findings, suite


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, "float32", 2)


def test_every_case_of_the_suite_fits():
    """All rounds of the longest context stay inside the caches, and no case drafts more than its width serves."""
    for case in suite():
        assert max(case.prompts) + case.new_tokens + case.width <= case.slots
        assert max(case.drafts) == case.width - 1
    assert len({(c.shape, c.batch, c.slots, c.width) for c in suite()}) == len(suite()), "a program compiled twice"


def test_floor_by_hand(model):
    """TINY: D 32, F 48, N 4, K 2, H 8, V 64, L 4, exit layer 2, float32."""
    layer = 4 * (32 + (4 + 2 * 2) * 8 * 32 + 32 * 32 + 32 + 2 * 48 * 32 + 32 * 48)
    head, drafter, kv = 4 * 64 * 32, 4 * (32 + 1), 2 * 2 * 8 * 4 * 4
    assert floor_of(model, batch=3) == Floor(2 * layer, head + drafter, 2 * layer + head, 3 * kv)
    expected = 2 * layer * 3 + 2 * (head + drafter) + (2 * layer + head) + 3 * kv * 100
    assert floor_of(model, batch=3).bytes(2, 100) == expected


def test_filled_state_is_one_that_a_prefill_could_have_left(model):
    """Same structure, shapes and types; plain decoding runs one round for every token up to the limit."""
    real = start(model, [list(range(1, 21))], DecodeConfig(draft_steps=2, max_new_tokens=8), Knobs.make(0, 0.0, ()))
    fresh = partial(filled_state, model, 1, real.tokens.shape[1], 3, 20, 8)
    filled = fresh()
    assert jax.tree.structure(filled) == jax.tree.structure(real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), filled) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    for name in ("length", "limit", "done"):
        assert np.array_equal(getattr(filled, name), getattr(real, name))
    assert np.array_equal(filled.committed.start, real.committed.start)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(filled))
    program, seconds = compile_decode(model, filled)
    timing = time_decode(program, model, fresh, 0, repeats=2)
    assert (timing.rounds, timing.tokens_per_round, timing.drafted_per_round) == (7, 1.0, 0.0)
    assert seconds > 0
    drafting = time_decode(program, model, fresh, 2, repeats=1)
    assert 0 < drafting.drafted_per_round <= 2


def test_floor_counts_what_decoding_reads():
    """A float32 drafter beside bfloat16 weights is decoded with in bfloat16: half its bytes."""
    half, full = (random_model(TINY, dtype, 2, "fused") for dtype in ("bfloat16", "float32"))
    assert 2 * floor_of(half).draft_bytes == floor_of(full).draft_bytes


def test_abstract_model_has_the_shapes_of_the_real_one(model):
    shapes = abstract_model(TINY, "float32", 2)
    assert shapes.definition == model.definition
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.params
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes.params))


def row(**changes: object) -> dict:
    base = {"shape": "7b", "mode": "plain", "batch": 1, "width": 1, "drafts": 0, "slots": 512, "context": 472.0}
    numbers = {"round_ms": 5.0, "floor_bytes": 10.0, "floor_fraction": 0.9, "tokens_per_second": 200.0}
    return base | numbers | changes


def test_findings_by_hand():
    found = findings(
        [
            row(),
            row(batch=32, tokens_per_second=4000.0),
            row(slots=16384, context=500.0, round_ms=5.0),
            row(slots=16384, context=16000.0, round_ms=9.0, floor_bytes=15.0),
            row(mode="speculative", width=6, drafts=5, floor_fraction=0.8),
            row(mode="speculative", width=6, drafts=3, floor_fraction=0.1),
            row(mode="plain", width=6, floor_fraction=0.2),
        ]
    )
    assert found == {
        "7b: token at context 16000 over 500": pytest.approx(1.8),
        "7b: token at context 16000 over 500, over what its bytes predict": pytest.approx(1.2),
        "7b: tokens per second, batch 32 over batch 1": pytest.approx(20.0),
        "7b: plain, fraction of the floor at context 472": 0.9,
        "7b: round with 5 drafts over its floor": pytest.approx(1.25),
    }


@pytest.mark.full
def test_one_program_then_its_picture(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "one.json", tmp_path / "speed.png"
    sizes = "--slots 128 --prompt 20 30 --new-tokens 8 --draft-steps 2 --repeats 1 --dtype float32"
    monkeypatch.setattr(sys, "argv", f"speed one --shape tiny {sizes} --out {out}".split())
    assert speed.main() == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    found = [(row["context"], row["drafts"], row["rounds"]) for row in result["rows"]]
    assert [pair[:2] for pair in found] == [(24.0, 0), (34.0, 0), (24.0, 2), (34.0, 2)]
    assert [rounds for _, drafts, rounds in found if not drafts] == [7, 7]
    for row in result["rows"]:
        assert row["floor_fraction"] == pytest.approx(row["floor_ms"] / row["round_ms"])
        assert row["floor_ms"] == pytest.approx(row["floor_bytes"] / row["copy_gb_per_s"] / 1e6)
    monkeypatch.setattr(sys, "argv", f"speed plot {out} {out} --out {picture}".split())
    assert speed.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("tiny: round with 2 drafts over its floor") == 2


@pytest.mark.full
def test_compile_times_come_from_processes_of_their_own(tmp_path, monkeypatch, capsys):
    """Both readings share one cache folder, empty at first; here the processes are calls."""
    caches = []

    def run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
        caches.append(env["DVI_JAX_CACHE"])
        monkeypatch.setattr(sys, "argv", command[2:])
        capsys.readouterr()
        assert speed.main() == 0
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(speed.subprocess, "run", run)
    out = tmp_path / "compile.json"
    sizes = "--slots 48 --prompt 24 --draft-steps 2 --dtype float32"
    monkeypatch.setattr(sys, "argv", f"speed compile --shape tiny {sizes} --out {out}".split())
    assert speed.main() == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["compile"]
    assert [(row["shape"], row["cache"]) for row in rows] == [("tiny", "cold"), ("tiny", "warm")]
    assert caches[0] == caches[1]
    for row in rows:
        parts = row["trace_seconds"] + row["prefill_seconds"] + row["decode_seconds"]
        assert row["total_seconds"] == pytest.approx(parts)
