"""A real model from its GGUF to its tokens: the same ids as transformers 4.33.3, plainly and speculatively."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dvi_jax.checkpoint import read_checkpoint, read_manifest
from dvi_jax.config import DecodeConfig
from dvi_jax.data import Message
from dvi_jax.decode.batch import Generation, generate_batch
from dvi_jax.loading import LoadedModel, from_checkpoint
from tests.real.conftest import KEPT

SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=24)

pytestmark = pytest.mark.real


def test_architecture(model):
    config = model.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.rope_theta, config.tie_word_embeddings) == (49152, 100000.0, True)


def test_the_kept_drafter_is_this_models(checkpoint):
    """By the weights' hash: the file is a Q4_1 one, so the official weights are others."""
    kept = read_manifest(KEPT)
    assert kept.base_sha256 == read_manifest(checkpoint).base_sha256
    assert len(kept.base_sha256) == 64


def test_chat_template_gives_the_golden_prompt_ids(model, rows):
    assert len(rows) == 16
    for row in rows:
        assert model.tokenizer.chat([Message("user", row["user"])]) == row["prompt_ids"]


def shortest(rows: list[dict], count: int) -> list[dict]:
    return sorted(rows, key=lambda row: len(row["prompt_ids"]))[:count]


def check_some_rejected(generations: list[Generation]) -> None:
    """Some drafts are accepted and some are not."""
    lengths = {length for g in generations for length in g.accept_lengths}
    assert 1 in lengths
    assert len(lengths) > 1


def test_speculative_greedy_ids(model, rows):
    """The shortest eight questions as one batch in float32, against the ids of transformers."""
    rows = shortest(rows, 8)
    generations, _ = generate_batch(model, [row["prompt_ids"] for row in rows], SETTINGS)
    assert [g.new_ids for g in generations] == [row["greedy_ids"][:24] for row in rows]
    check_some_rejected(generations)


@pytest.mark.full
def test_greedy_ids_of_all_questions(model, rows):
    """To their last token, plainly."""
    longest = max(len(row["greedy_ids"]) for row in rows)
    prompts = [row["prompt_ids"] for row in rows]
    generations, _ = generate_batch(model, prompts, DecodeConfig(draft_steps=0, max_new_tokens=longest), plain=True)
    equal = [g.new_ids == row["greedy_ids"] for g, row in zip(generations, rows, strict=True)]
    assert equal == [True] * 16


def beginning(path: Path, layers: int) -> LoadedModel:
    """The first layers alone, from all but two of which the head drafts: every layer is compiled apart."""
    checkpoint = read_checkpoint(path)
    kept = {str(index): checkpoint.base["layers"][str(index)] for index in range(layers)}
    return from_checkpoint(
        replace(
            checkpoint,
            config=replace(checkpoint.config, num_layers=layers),
            manifest=replace(checkpoint.manifest, exit_layer=layers - 2),
            base=checkpoint.base | {"layers": kept},
        )
    )


@pytest.mark.parametrize("layers", [4, pytest.param(30, marks=pytest.mark.full)])
def test_speculative_equals_plain_in_bfloat16(checkpoint, model, rows, layers):
    """Of the whole model with its drafter, and of its first layers, which drafts are often right for too.

    One program does both; how the bits of several compare: tests/decode/test_lossless.py.
    """
    if layers < model.config.num_layers:
        model = beginning(checkpoint, layers)
    base = jax.tree.map(lambda x: x.astype("bfloat16"), model.params.base)
    model = replace(model, manifest=replace(model.manifest, dtype="bfloat16"))
    model = model.with_params(model.params._replace(base=base))
    prompts = [row["prompt_ids"] for row in shortest(rows, 2)]
    plain, _ = generate_batch(model, prompts, SETTINGS, plain=True)
    fast, _ = generate_batch(model, prompts, SETTINGS)
    assert [g.output_ids for g in fast] == [g.output_ids for g in plain]
    check_some_rejected(fast)
