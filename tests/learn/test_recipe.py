"""What is chosen for a model nobody has tuned a drafter for: by its size, the device, and the time there is."""

from __future__ import annotations

import itertools
import json

import pytest

from dvi_jax.config import MeshConfig
from dvi_jax.errors import UserError
from dvi_jax.learn.recipe import Rates, Recipe, choose_drafter, choose_recipe, fit_to_time, parameters
from dvi_jax.presets import SHAPES

GIB = 2**30
RATES = Rates(
    reply_tokens=100.0,
    training_tokens=400.0,
    update_seconds=2.0,
    reply_memory=0,
    training_memory=0,
    drafter_bytes=0,
)


def test_parameters_are_the_published_counts():
    """SmolLM2-135M, TinyLlama 1.1B, Llama 2 7B, by their model cards."""
    counts = {name: parameters(SHAPES[name]) for name in ("smollm2", "1b", "7b")}
    assert counts == {"smollm2": 134_515_008, "1b": 1_100_048_384, "7b": 6_738_415_616}


def test_drafters_by_size():
    """`fused` with the taps of the kept drafter for SmolLM2, a block of seven in one pass for large models."""
    assert choose_drafter(SHAPES["smollm2"]) == ("fused", {"taps": [2, 9, 16, 23]}, 1)
    assert choose_drafter(SHAPES["1.5b"])[0] == "fused"
    kind, options, exit_layer = choose_drafter(SHAPES["7b"])
    assert (kind, options["layers"], options["block"], len(options["taps"]), exit_layer) == ("block", 2, 7, 4, None)


def test_a_large_vocabulary_is_drafted_in_part_and_a_wide_drafter_learns_slowly():
    small, large = (choose_recipe(SHAPES[n], "bfloat16", 60 * GIB, accelerator=True) for n in ("smollm2", "1.5b"))
    assert (small.draft_vocabulary, small.lr) == (0, 1e-3)
    settings = large.training("model", "out", "replies.npz", 1000, MeshConfig())
    assert (settings.draft_vocabulary, settings.lr) == (32768, pytest.approx(1e-3 * 1024 / 1536))


@pytest.mark.parametrize("rows", [5, 8, 15])
def test_a_log_too_short_for_so_many_devices(rows):
    """Rows held out and rows of an update both divide among them."""
    recipe = choose_recipe(SHAPES["smollm2"], "bfloat16", 60 * GIB, accelerator=True)
    with pytest.raises(UserError, match=f"fill {rows} rows of {recipe.row_length} tokens, and .* data=8 takes 16"):
        recipe.training("model", "out", "replies.npz", rows, MeshConfig(data=8))
    assert recipe.training("model", "out", "replies.npz", 16, MeshConfig(data=8)).eval_rows == 8


def test_caches_of_a_batch_fit_beside_the_model():
    """7B in bfloat16: 2 * 32 layers * 32 heads * 128 * 2 bytes a position, at most a fifth of what is free."""
    recipe = choose_recipe(SHAPES["7b"], "bfloat16", 60 * GIB, accelerator=True)
    assert recipe.replies.batch_tokens == 12 * GIB // (2 * 32 * 32 * 128 * 2)
    assert choose_recipe(SHAPES["smollm2"], "bfloat16", 60 * GIB, accelerator=True).replies.batch_tokens == 81920


def test_as_many_prompts_as_there_is_time_for():
    """8 passes: a token costs 1 / 100 + 8 / 400 s, and a prompt of 36 tokens with its reply has 36 + 0.8 * 64."""
    recipe = choose_recipe(SHAPES["smollm2"], "float32", 8 * GIB, accelerator=False)
    affordable = 3000 * 87.2 * (1 / 100 + 8 / 400)
    looked_at = itertools.count()
    fitted, lengths = fit_to_time(recipe, RATES, (36 for _ in looked_at), affordable + 1)
    assert (fitted.prompts, lengths, next(looked_at)) == (3000, [36] * 3000, 3001)
    assert (fitted.save_every, fitted.log_every) == (30, 2)
    assert fit_to_time(recipe, RATES, [36] * 500, affordable)[0].prompts == 500


def test_a_recipe_survives_its_file():
    recipe = choose_recipe(SHAPES["7b"], "bfloat16", 60 * GIB, accelerator=True)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json())), "here") == recipe
    with pytest.raises(UserError, match="here: unknown key colour"):
        Recipe.from_json(recipe.to_json() | {"colour": 1}, "here")
