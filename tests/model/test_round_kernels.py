"""A round through the GPU kernels, interpreted: the layout of rows, and the same bits however many there are."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model import attention, decode_attention, decode_products, layers, residual
from dvi_jax.model.drafters import fused, layer
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.presets import TINY
from experiments.measure import random_model, random_weights

CONFIG = replace(TINY, num_layers=2, hidden_size=96, num_heads=3, num_kv_heads=1, intermediate_size=64)
SLOTS, FILLED = 128, 70
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 6)).astype(np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in place of XLA's products, norms and attention, as on a GPU."""
    for name in ("product", "gated_product"):
        kernel = partial(getattr(decode_products, name), interpret=True)
        for module in (decode_products, layers):
            monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(residual, "add_and_norm", partial(residual.add_and_norm, interpret=True))
    attend = partial(decode_attention.cached_attention, interpret=True)
    monkeypatch.setattr(decode_attention, "cached_attention", attend)
    monkeypatch.setattr(decode_products, "is_supported", lambda rows, dtype: rows <= 64)
    monkeypatch.setattr(decode_attention, "is_supported", lambda rows, size, dtype: True)


@pytest.fixture(scope="module")
def model():
    """One whose exit layer is tapped."""
    manifest = random_model(CONFIG, "bfloat16", 1, "fused").manifest
    manifest = replace(manifest, drafter_config={"taps": [1]})
    return LoadedModel(CONFIG, manifest, *split(build_model(CONFIG, manifest, random_weights(CONFIG, manifest))))


def caches(batch):
    """Keys and values of every sequence, the same whatever the batch."""
    rng = np.random.default_rng(1)
    shape = (4, CONFIG.num_kv_heads, SLOTS, CONFIG.head_dim)

    def one():
        return jnp.asarray(rng.normal(size=shape)[:batch], jnp.bfloat16)

    return [(attention.LayerCache(one(), one()),) for _ in range(CONFIG.num_layers)]


def verified(model, tokens):
    """Logits and caches of a pass over tokens [B, T] behind what is filled, by all layers."""

    def run(params, tokens, below, above):
        verifier = join(model.definition, params).llama
        positions = FILLED + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, below = verifier.shallow(tokens, below, positions)
        final, _, above = verifier.deep(hidden, above, positions)
        return verifier.round_logits(final), below, above

    return jax.device_get(jax.jit(run)(model.params, jnp.asarray(tokens), *caches(len(tokens))))


def test_rows_are_alike_in_any_number(model, interpreted):
    """Six tokens of three sequences each at once, two tiles, then one alone: all logits and cached keys to the bit."""
    whole, part = verified(model, TOKENS), verified(model, TOKENS[:1, :1])
    np.testing.assert_array_equal(part[0], whole[0][:1, :1])
    for few, all_ in zip(jax.tree.leaves(part[1:]), jax.tree.leaves(whole[1:]), strict=True):
        np.testing.assert_array_equal(few[:, :, : FILLED + 1], all_[:1, :, : FILLED + 1])


def test_the_kernels_compute_what_xla_does(model, request):
    by_xla = verified(model, TOKENS)
    request.getfixturevalue("interpreted")
    by_kernels = verified(model, TOKENS)
    scale = np.abs(by_xla[0]).max()
    np.testing.assert_allclose(by_kernels[0], by_xla[0], atol=0.02 * scale)
    for found, expected in zip(jax.tree.leaves(by_kernels[1:]), jax.tree.leaves(by_xla[1:]), strict=True):
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=0.1, rtol=2.0**-6)


def through_both_halves(model, tokens):
    """What a round's pass gives, at once and half by half: of both the arrays, in the same order."""

    def run(params, tokens, below, above):
        verifier = join(model.definition, params).llama
        positions = FILLED + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        whole = verifier.verify(tokens, below, above, positions)
        hidden, tapped, below = verifier.shallow(tokens, below, positions)
        final, deep_tapped, above = verifier.deep(hidden, above, positions)
        return tuple(whole), (hidden, final, tapped + deep_tapped, verifier.round_logits(final), below, above)

    return jax.device_get(jax.jit(run)(model.params, jnp.asarray(tokens), *caches(len(tokens))))


@pytest.mark.parametrize("by", ["kernels", "XLA"])
@pytest.mark.parametrize("rows", [TOKENS, TOKENS[:1, :1]], ids=["two tiles", "one row"])
def test_both_halves_at_once(model, request, by, rows):
    """The exit layer, which is tapped too, is no border for bits."""
    if by == "kernels":
        request.getfixturevalue("interpreted")
    whole, halves = through_both_halves(model, rows)
    jax.tree.map(np.testing.assert_array_equal, whole, halves)


def test_a_drafters_stream_may_begin_with_a_product(interpreted, monkeypatch):
    """Its parts are added up by the first norm: as the product rounded by itself, laid flat."""
    monkeypatch.setattr(layer, "product", partial(decode_products.product, interpret=True))
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 3, 1024), (96, 1024)))
    norm = jnp.asarray(rng.normal(size=96), jnp.bfloat16)
    begun = [layer.begin_round(x, 32, weight), layer.begin_round(decode_products.round_linear(x, weight), 32)]
    assert len(begun[0].added) > 1
    for found, expected in zip(*(each.normed(norm, 1e-5)[0:2] for each in begun), strict=True):
        found, expected = (getattr(each, "x", each) for each in (found, expected))
        np.testing.assert_array_equal(found, expected)


def test_a_drafters_products(interpreted):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 3, 96), (40, 96)))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = np.asarray(fused.round_linear(x, weight), np.float64)
    np.testing.assert_allclose(found, expected, rtol=2.0**-7, atol=1e-3)
