"""Keys of one size in all channels: the same model in every bit, and closer to it in 8 bits where biases are large."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import MeshConfig
from dvi_jax.importing.rounding import rounded
from dvi_jax.loading import from_checkpoint
from dvi_jax.mesh import make_mesh, row_order
from dvi_jax.model.llama import random_base
from dvi_jax.model.quantised import Quantised
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.presets import TINY
from dvi_jax.quantisation import Quantisation

CONFIG = replace(TINY, num_layers=2, hidden_size=128, head_dim=32, model_type="qwen2")
N, K, H = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
KEYS = slice(N * H, (N + K) * H)
TOKENS, POSITIONS = jnp.arange(24)[None] * 7 % 64, jnp.arange(24)[None]


def checkpoint(dtype="bfloat16", weights=None, lora=None, size=1.0):
    """Keys that four channels of a head have biases of 300 in, beside weights that add about `size` everywhere."""
    rng = np.random.default_rng(0)
    base = jax.tree.map(np.array, random_base(CONFIG, jax.random.key(0), std=0.1))
    for layer in base["layers"].values():
        layer["qkv_bias"][KEYS] = np.where(np.arange(K * H) % 8, 0, 300 * rng.normal(size=K * H))
        layer["qkv"][KEYS] *= size
    base = jax.tree.map(lambda array: array.astype(dtype), base)
    how = weights and Quantisation(weights=weights, group=32)
    for layer in base["layers"].values() if how else ():
        for name in filter(lambda name: how.includes((name,)), layer):
            layer[name] = rounded(layer[name], how).parts()
    options = {"drafter": "exit_head", "drafter_config": {"rank": 4, "alpha": 4.0}, "lora": lora or {}}
    manifest = Manifest(source="random", source_sha256="", dtype=dtype, exit_layer=1, quantisation=how, **options)
    return Checkpoint(Path("random"), CONFIG, manifest, base)


def module_of(model):
    return join(model.definition, model.params)


@partial(jax.jit, static_argnums=(0, 2))
def _final(definition, params, adapted):
    llama = join(definition, params).llama
    caches = llama.init_caches(*TOKENS.shape)
    hidden, _, _ = llama.shallow(TOKENS, caches[0], POSITIONS, adapted=adapted, fresh=True)
    return llama.deep(hidden, caches[1], POSITIONS, fresh=True)[0]


def final(module, adapted=False):
    """The verifier's states of TOKENS, float64, keys and values as the model keeps them."""
    return np.asarray(_final(*split(module), adapted), np.float64)


def exponents(module):
    """By how many halvings the first layer has keys smaller [K, H]."""
    return -np.log2(module.llama.layers[0].qkv_factors[...][KEYS]).reshape(K, H)


def rows(module):
    """The first layer's weight of queries, keys and values, float32."""
    weight = module.llama.layers[0].qkv[...]
    return np.asarray(weight.dequantised(np.float32) if isinstance(weight, Quantised) else weight, np.float32)


FORMS = [("bfloat16", None, 1), ("float32", "int8", 1), ("bfloat16", "int4", 2.0**-10)]


@pytest.mark.parametrize(("dtype", "weights", "size"), FORMS)
def test_no_bit_changes(dtype, weights, size, train_noise):
    """Nor with adapters on queries and keys, nor where scales of groups, in float16, are too small to be divided."""
    made = from_checkpoint(checkpoint(dtype, weights, {"rank_s": 2, "rank_d": 2}, size))
    model = made.with_params(train_noise(made.params, "lora_s", "lora_d"))
    equal = model.with_kv("int8").with_kv("float8").with_kv("int8")  # done once
    found = exponents(module_of(equal))
    assert np.ptp(found) >= 3
    np.testing.assert_array_equal(found[:, : H // 2], found[:, H // 2 :])  # what RoPE turns together
    factors = np.asarray(module_of(equal).llama.layers[0].qkv_factors[...])[:, None]
    np.testing.assert_array_equal(rows(module_of(equal)), rows(module_of(model)) * factors)
    for adapted in (False, True):
        np.testing.assert_array_equal(
            final(module_of(equal.with_kv("dtype")), adapted), final(module_of(model), adapted)
        )


def test_keys_in_8_bits_are_nearer_to_what_they_stand_for():
    """Where biases are large; the model that this one was made of stays as it is."""
    model = from_checkpoint(checkpoint("float32"))
    as_they_are = module_of(model)
    right = final(as_they_are)
    as_they_are.llama.kv = "int8"
    equal = model.with_kv("int8")
    before, after = (np.square(final(module) - right).mean() for module in (as_they_are, module_of(equal)))
    assert after < before / 5
    np.testing.assert_array_equal(final(module_of(model)), right)


def test_each_device_has_the_factors_of_its_heads():
    """Four devices, two KV heads: each of these is on two of them, with one of its queries on each."""
    mesh = make_mesh(MeshConfig(1, 4))
    one, four = (from_checkpoint(checkpoint(weights="int8"), kv="int8", mesh=each) for each in (None, mesh))
    order = row_order("qkv", CONFIG, 4)
    for name in ("qkv_factors", "qkv_bias"):
        whole, parts = (np.asarray(getattr(module_of(each).llama.layers[1], name)[...]) for each in (one, four))
        np.testing.assert_array_equal(parts, whole[order])
    whole, parts = (np.asarray(module_of(each).llama.layers[1].qkv[...].scales) for each in (one, four))
    np.testing.assert_array_equal(parts, whole[order])
