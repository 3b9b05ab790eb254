"""A sequence where it lies among others: the bits that it has by itself, and nothing of theirs touched."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import WHOLE_KV
from dvi_jax.model import attention, decode_attention, placed_cache, prefill_attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.kept_kv import keep
from dvi_jax.presets import TINY

HEADS = (4, 2, 32)
SLOTS, START, PLACE = 160, 30, 2


def caches(kv):
    """Of three sequences, with something in every slot."""
    config = replace(TINY, num_kv_heads=HEADS[1], head_dim=HEADS[2])
    (empty,) = attention.init_caches(config, 1, 3, SLOTS, jnp.bfloat16, kv)
    shape = (3, HEADS[1], SLOTS, HEADS[2])
    return LayerCache(*(keep(jax.random.normal(jax.random.key(n), shape, jnp.bfloat16), empty.key) for n in (0, 1)))


@pytest.fixture(params=["einsum", "kernels"])
def ways(request, monkeypatch):
    """Rows are attended as a CPU does it, and as a GPU does, its kernels interpreted."""
    if request.param == "kernels":
        interpreted = partial(decode_attention.cached_attention, interpret=True)
        monkeypatch.setattr(decode_attention, "cached_attention", interpreted)
        monkeypatch.setattr(
            prefill_attention, "prefill_attention", partial(prefill_attention.prefill_attention, interpret=True)
        )
        for module in (attention, decode_attention, placed_cache):
            monkeypatch.setattr(module, "has_gpu_kernels", lambda dtype: True)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("kv", [WHOLE_KV, "int8"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [5, 70], ids=["round", "prefill"])
def test_a_sequence_among_others(kv, biased, tokens):
    every, width = caches(kv), (HEADS[0] + 2 * HEADS[1]) * HEADS[2]
    qkv = jax.random.normal(jax.random.key(2), (1, 1, tokens, width), jnp.float32 if biased else jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(3), (width,), jnp.bfloat16) if biased else None
    positions = START + jnp.arange(tokens, dtype=jnp.int32)[None]
    rope = attention.rope_tables(attention.rope_frequencies(HEADS[2], 10000.0, None), positions)
    own = jax.tree.map(lambda x: x[PLACE : PLACE + 1], every)
    expected, alone = attention.attend_cached(qkv, HEADS, rope, own, positions, bias)

    def attend(cache, place):
        (placed,) = placed_cache.placed((cache,), place)
        mixed, placed = attention.attend_cached(qkv, HEADS, rope, placed, positions, bias)
        return mixed, *placed_cache.all_of([placed])

    found, cache = jax.jit(attend)(every, jnp.array([PLACE], jnp.int32))
    np.testing.assert_array_equal(found, expected)
    for after, before, right in zip(*map(jax.tree.leaves, (cache, every, alone)), strict=True):
        np.testing.assert_array_equal(after[PLACE], right[0])
        np.testing.assert_array_equal(after[:PLACE], before[:PLACE])
    assert not np.array_equal(jax.tree.leaves(cache)[0][PLACE], jax.tree.leaves(every)[0][PLACE])
