"""First weights by least squares: the map is the best one, and drafts with it are more often right."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import DecodeConfig, MeshConfig
from dvi_jax.learn import first_weights
from dvi_jax.learn.first_weights import BESIDE, RIDGE, from_own_texts, from_windows
from dvi_jax.learn.rollout import rollout
from dvi_jax.loading import LoadedModel, build_model, from_checkpoint
from dvi_jax.mesh import make_mesh, to_host
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


def test_the_map_is_the_one_of_least_squares(fused):
    """Against numpy, over the rows that lie in a text; the first draft is the map, normed."""
    windows, _ = rollout(fused, PROMPTS, SETTINGS, longest_prompt=8)
    begun = from_windows(fused, windows)
    before, new = (jax.tree.map(np.asarray, model.params.drafter["drafter"]) for model in (fused, begun))

    embed = np.asarray(join(fused.definition, fused.params).llama.embed[...], np.float32)
    final = np.asarray(windows.features.final, np.float32)
    x, y = [], []
    for row, length in enumerate(np.asarray(windows.length)):
        at = np.arange(1, length - 1)
        tokens = np.asarray(windows.tokens)[row, at]
        x.append(np.concatenate([unit(embed[tokens]), unit(final[row, at])], axis=1))
        y.append(final[row, at + 1])
    x, y = np.concatenate(x).astype(np.float64), np.concatenate(y).astype(np.float64)
    gram = x.T @ x
    cost = RIDGE * np.mean(np.diagonal(gram))
    best = np.linalg.solve(gram + cost * np.eye(len(gram)), x.T @ y).T
    norm = np.where(new["norm"] == 0, 1, new["norm"])
    np.testing.assert_allclose(new["fuse"] * norm[:, None], best, atol=2e-4)
    # The rest of the layer waits in its random weights, and says nothing yet.
    assert not new["out"].any()
    assert not new["down"].any()
    for name in ("qkv", "gate_up", "norm"):
        np.testing.assert_array_equal(new[name], before[name])

    module = join(begun.definition, begun.params)
    rows = jnp.broadcast_to(jnp.arange(windows.tokens.shape[1]), windows.tokens.shape)
    hidden = module.llama.shallow(windows.tokens, None, rows)[0]
    features = jax.tree.map(lambda z: z[:, 1:].astype(jnp.float32), windows.features)
    draft = np.asarray(module.drafter.unroll(hidden[:, :-1], features, rows[:, :-1], 1)[0])[0, 1:]
    length = int(windows.length[0])
    mapped = x[: length - 2] @ (best / norm[:, None]).T
    np.testing.assert_allclose(draft[: length - 2], unit(mapped) * new["norm"], atol=2e-2)


def test_own_texts(fused, monkeypatch):
    """A drafter that begins with them comes nearer to the verifier; the base and all else stay."""
    monkeypatch.setattr(first_weights, "BESIDE", 4)
    begun = from_own_texts(fused, texts=6, length=24)
    windows, _ = rollout(fused, PROMPTS, SETTINGS, longest_prompt=8)

    def distance(model):
        module = join(model.definition, model.params)
        rows = jnp.broadcast_to(jnp.arange(windows.tokens.shape[1]), windows.tokens.shape)
        hidden = module.llama.shallow(windows.tokens, None, rows)[0]
        features = jax.tree.map(lambda z: z[:, 1:].astype(jnp.float32), windows.features)
        draft = module.drafter.unroll(hidden[:, :-1], features, rows[:, :-1], 1)[0]
        inside = (rows[:, 1:] < windows.length[:, None]) & (rows[:, :-1] > 0)
        return float(jnp.sum(jnp.where(inside[..., None], draft - features.final, 0) ** 2))

    assert distance(begun) < 0.8 * distance(fused)
    assert begun.params.base is fused.params.base
    assert jax.tree.structure(begun.params) == jax.tree.structure(fused.params)
    for new, old in zip(jax.tree.leaves(begun.params), jax.tree.leaves(fused.params), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_windows_without_text_leave_finite_weights(fused):
    windows, _ = rollout(fused, PROMPTS, SETTINGS, longest_prompt=8)
    begun = from_windows(fused, windows.replace(length=jnp.zeros_like(windows.length)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(begun.params.drafter))


def test_other_drafters_begin_as_they_are(make_tiny):
    model = make_tiny()
    assert from_own_texts(model) is model


def test_on_several_devices_they_are_those_of_one():
    manifest = Manifest(
        source="r", source_sha256="", dtype="float32", exit_layer=0, drafter="fused", drafter_config={"taps": [1]}
    )
    config = replace(TINY, num_layers=2)
    base = jax.tree.map(np.asarray, random_base(config, jax.random.key(0), std=0.3))
    checkpoint = Checkpoint("random", config, manifest, base)
    one, four = (from_checkpoint(checkpoint, mesh=make_mesh(mesh)) for mesh in (MeshConfig(), MeshConfig(2, 2)))
    windows = jax.device_get(rollout(one, PROMPTS, SETTINGS, longest_prompt=8)[0])
    of_one, of_four = (to_host(from_windows(model, windows).params.drafter) for model in (one, four))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), of_one, of_four)
    new = from_own_texts(four, texts=BESIDE, length=8).params.drafter
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(lambda x: x.sharding, four.params.drafter)
