"""First weights by least squares: the map is the best one, whichever way the texts come."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig
from dvi_jax.learn.first_weights import RIDGE, NormalEquations, added, solved
from dvi_jax.learn.rollout import rollout
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.presets import TINY

SETTINGS = DecodeConfig(draft_steps=1, plan="plain", max_new_tokens=24)
PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 4]]


@pytest.fixture(scope="module", params=[(), (1,)], ids=["final", "taps"])
def fused(request):
    """A tiny model with an untrained fused drafter and no exit layer; one of its norm's weights is nothing."""
    config = replace(TINY, num_layers=2)
    base = random_base(config, jax.random.key(0), std=0.3)
    base["norm"] = jnp.linspace(0.5, 2, config.hidden_size).at[3].set(0)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="float32",
        exit_layer=0,
        drafter="fused",
        drafter_config={"taps": list(request.param)},
        lora={},
    )
    return LoadedModel(config, manifest, *split(build_model(config, manifest, base)), drafter_is_trained=False)


def unit(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def begun(model, windows, at_once=1):
    """The model with first weights from `windows`, added up so many at a time."""
    add, solve = (jax.jit(partial(work, model.definition)) for work in (added, solved))
    equations = NormalEquations.empty(model)
    for first in range(0, len(windows.length), at_once):
        equations = add(model.params, equations, jax.tree.map(lambda x, n=first: x[n : n + at_once], windows))
    return model.with_params(model.params._replace(drafter=solve(model.params, equations)))


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_map_is_the_one_of_least_squares(fused, at_once):
    """Against numpy, over the rows that lie in a text; the first draft is the map, normed."""
    windows, _ = rollout(fused, PROMPTS, SETTINGS, longest_prompt=8)
    found = begun(fused, windows, at_once)
    before, new = (jax.tree.map(np.asarray, model.params.drafter["drafter"]) for model in (fused, found))

    embed = np.asarray(join(fused.definition, fused.params).llama.embed[...], np.float32)
    final = np.asarray(windows.features.final, np.float32)
    x, y = [], []
    for row, length in enumerate(np.asarray(windows.length)):
        at = np.arange(1, length - 1)
        tokens = np.asarray(windows.tokens)[row, at]
        x.append(np.concatenate([unit(embed[tokens]), unit(final[row, at])], axis=1))
        y.append(final[row, at + 1])
    x, y = np.concatenate(x).astype(np.float64), np.concatenate(y).astype(np.float64)
    best = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y).T
    norm = np.where(new["norm"] == 0, 1, new["norm"])
    np.testing.assert_allclose(new["fuse"] * norm[:, None], best, atol=2e-5)
    # The rest of the layer waits in its random weights, and says nothing yet.
    assert not new["out"].any()
    assert not new["down"].any()
    for name in ("qkv", "gate_up", "norm"):
        np.testing.assert_array_equal(new[name], before[name])

    module = join(found.definition, found.params)
    rows = jnp.broadcast_to(jnp.arange(windows.tokens.shape[1]), windows.tokens.shape)
    hidden = module.llama.shallow(windows.tokens, None, rows)[0]
    features = jax.tree.map(lambda z: z[:, 1:].astype(jnp.float32), windows.features)
    draft = np.asarray(module.drafter.unroll(hidden[:, :-1], features, rows[:, :-1], 1)[0])[0, 1:]
    length = int(windows.length[0])
    mapped = x[: length - 2] @ (best / norm[:, None]).T
    np.testing.assert_allclose(draft[: length - 2], unit(mapped) * new["norm"], atol=2e-2)


def test_windows_without_text_say_nothing(fused):
    windows, _ = rollout(fused, PROMPTS, SETTINGS, longest_prompt=8)
    found = begun(fused, windows.replace(length=jnp.zeros_like(windows.length)))
    assert not found.params.drafter["drafter"]["fuse"].any()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.params.drafter))


def test_other_drafters_begin_as_they_are(make_tiny):
    assert NormalEquations.empty(make_tiny()) is None
