"""Distillations side by side: the same as apart, and compiled once."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from dvi_jax.errors import ArgumentParser, UserError
from dvi_jax.learn.offline import train_offline
from dvi_jax.learn.packing import Packed
from experiments import curves, drafters_page, draw, losses
from experiments.side_by_side import _update, add_arguments, open_bench


@pytest.fixture
def arguments(byte_checkpoint, tmp_path) -> list[str]:
    """The options that losses and curves share, for a text of 40 rows and six questions."""
    tokens = np.random.default_rng(0).integers(2, 258, (40, 32)).astype(np.uint16)
    Packed(tokens, np.ones(tokens.shape, bool)).save(tmp_path / "text.npz")
    settings = {
        "trainer": "distill",
        "checkpoint": str(byte_checkpoint),
        "out": str(tmp_path / "run"),
        "data": [str(tmp_path / "text.npz")],
        "drafter": "exit_head",
        "drafter_options": {"rank": 4},
        "exit_layer": 1,
        "tokens": 512,
        "row_length": 32,
        "batch_rows": 4,
        "eval_rows": 4,
        "unroll_steps": 1,
        "warmup": 2,
    }
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    asked = [{"question_id": n, "category": "writing", "turns": [f"what is {n}?"]} for n in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    files = ["--config", str(tmp_path / "distill.yaml"), "--questions", str(tmp_path / "questions.jsonl")]
    return [*files, "--prompts", "3", "--draft-steps", "2", "--new-tokens", "8"]


def test_losses(arguments, tmp_path):
    """A second seed compiles nothing, and the picture is drawn again from the result."""
    out, compiled = tmp_path / "out" / "losses.json", _update._cache_size()
    chosen = ["--losses", "KL", "cross-entropy", "--seeds", "2", "--out", str(out)]
    assert losses.main([*arguments, *chosen]) == 0
    assert _update._cache_size() - compiled == 2
    found = json.loads(out.read_text(encoding="utf-8"))["losses"]
    assert {name: len(runs) for name, runs in found.items()} == {"KL": 2, "cross-entropy": 2}
    assert found["KL"][0] != found["KL"][1]
    out.with_suffix(".png").unlink()
    assert draw.main([str(out)]) == 0
    assert out.with_suffix(".png").exists()


def test_an_update_is_that_of_a_distillation(arguments, tmp_path):
    """A run ends with the weights that `dvi_jax.train` ends with."""
    parser = ArgumentParser()
    add_arguments(parser, prompts=3)
    bench = open_bench(parser.parse_args([*arguments, "--out", str(tmp_path / "never.json")]))
    config = bench.config
    side = bench.train(config.drafter, config.drafter_options, config.tokens, config.seed)
    alone = train_offline(config).model
    for ours, theirs in zip(jax.tree.leaves(side.params.lora_s), jax.tree.leaves(alone.params.lora_s), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.full
def test_curves(arguments, tmp_path, monkeypatch):
    """Every drafter at the smallest budget first, from one program each."""
    monkeypatch.setattr(
        curves,
        "drafters",
        lambda config, block: {"head": ("exit_head", {"rank": 4}), "heads": ("medusa", {"heads": block})},
    )
    out, compiled = tmp_path / "curves.json", _update._cache_size()
    assert curves.main([*arguments, "--tokens", "512", "256", "--out", str(out)]) == 0
    assert _update._cache_size() - compiled <= 2
    found = json.loads(out.read_text(encoding="utf-8"))["curves"]
    assert {name: [point["tokens"] for point in points] for name, points in found.items()} == {
        "head": [256, 512],
        "heads": [256, 512],
    }
    assert all(1 <= point["tokens_per_round"] <= 3 for points in found.values() for point in points)
    assert draw.main([str(out)]) == 0


def test_what_is_no_comparison(arguments, tmp_path):
    out = ["--out", str(tmp_path / "never.json")]
    with pytest.raises(UserError, match="unknown losses KL2; known: KL; total variation"):
        losses.main([*arguments, *out, "--losses", "KL2"])
    with pytest.raises(UserError, match="has 6 questions of at most 128 tokens"):
        losses.main([*arguments, *out, "--prompts", "7"])
    assert not (tmp_path / "never.json").exists()


def test_the_comparison_page_is_that_of_the_kept_results():
    kept = Path(drafters_page.__file__).with_name("drafters.md").read_text(encoding="utf-8")
    assert drafters_page.page() == kept
    assert "| SmolLM2-135M-Instruct | Spec-Bench, 240 | fused | `tree:16` | 3.01 |" in kept
