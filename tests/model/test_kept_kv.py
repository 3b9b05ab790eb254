"""Keys and values in 8 bits: how far they are from what was written, and that all who read them see the same.

The kernels are interpreted, against attention in numpy over what the 8 bits stand for.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.attention_chunks import CHUNK_SLOTS, UNCUT_SLOTS
from dvi_jax.model.decode_attention import cached_attention
from dvi_jax.model.kept_kv import KINDS, Kept, keep, quantised
from dvi_jax.model.prefill_attention import prefill_attention
from dvi_jax.model.tree_attention import Tree, keep_path, tree_attention
from dvi_jax.presets import TINY
from tests.lowering import gpu_text

HEADS, SIZE, TOKENS = (6, 2, 32), 32, 9  # three queries for each KV head: two tiles of queries
SLOTS, STARTS = UNCUT_SLOTS + 76, np.array([CHUNK_SLOTS - 2, UNCUT_SLOTS + 67])  # ends in different chunks
# Two nodes behind the root, one behind the first of them: paths as `Tree` has them.
PATHS, DEPTH = np.array([[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]], np.int32), np.array([0, 1, 1, 2])


def float64(rows: Kept) -> np.ndarray:
    """What is kept, exactly."""
    return np.asarray(rows.values, np.float64) * np.asarray(rows.scales, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", KINDS)
def test_the_error_is_bounded(kv, dtype):
    """Half a scale with int8; float8_e4m3 has 3 bits behind its first, and steps of 2**-9 below 2**-6."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 3, 5, 64)) * 10.0 ** rng.integers(-6, 6, (2, 3, 5, 1))
    rows[0, 0, 0] = 0
    rows = jnp.asarray(rows, dtype)
    kept = jax.jit(lambda x: keep(x, Kept(jnp.zeros(x.shape, KINDS[kv]), x[..., :1])))(rows)
    x, scale = np.asarray(rows, np.float64), np.asarray(kept.scales, np.float64)
    bound = scale / 2 if kv == "int8" else np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    assert kept.values.dtype == KINDS[kv]
    assert kept.scales.dtype == dtype
    assert np.all(np.abs(x - float64(kept)) <= bound * (1 + 1e-6))  # a quotient of float32 is rounded itself
    largest = {"int8": 127, "float8": 448}[kv]
    full = np.abs(np.asarray(kept.values, np.float64)).max(axis=-1)
    assert np.all(full[1:] >= 0.99 * largest)  # all 8 bits are used
    np.testing.assert_array_equal(float64(kept)[0, 0, 0], 0)


@pytest.mark.parametrize("kv", KINDS)
def test_pieces_are_the_whole(kv):
    """Kernels have a key in two halves, einsums in one: equal bits."""
    row = jax.random.normal(jax.random.key(0), (7, 64), jnp.bfloat16)
    (whole,), scale = quantised([row], KINDS[kv], row.dtype)
    halves, same = quantised([row[:, :32], row[:, 32:]], KINDS[kv], row.dtype)
    np.testing.assert_array_equal(scale, same)
    np.testing.assert_array_equal(whole, jnp.concatenate(halves, axis=1))


class Case:
    """Random rows over a filled cache, and what the kernel of a round makes of them."""

    def __init__(self, kv):
        key, *keys = jax.random.split(jax.random.key(0), 3)
        n, k, h = HEADS
        self.qkv = jax.random.normal(key, (1, 2, TOKENS, n + 2 * k, h), jnp.bfloat16)
        zeros = Kept(jnp.zeros((2, k, SLOTS, h), KINDS[kv]), jnp.zeros((2, k, SLOTS, 1), jnp.bfloat16))
        self.cache = LayerCache(*(keep(jax.random.normal(each, zeros.shape, jnp.bfloat16), zeros) for each in keys))
        self.positions = jnp.asarray(STARTS[:, None] + np.arange(TOKENS), jnp.int32)
        self.mixed, *written = self.attended(self.qkv, self.cache, self.positions)
        self.written = LayerCache(*written)

    def rope(self, positions):
        return attention.rope_tables(attention.rope_frequencies(SIZE, 10000.0, None), positions)

    def attended(self, qkv, cache, positions):
        flat = qkv.reshape(1, -1, *qkv.shape[3:])
        mixed, *written = cached_attention(flat, self.rope(positions), *cache, positions, interpret=True)
        return mixed.reshape(*positions.shape, -1), *written


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return Case(request.param)


def by_formula(query, cache, positions):
    """Softmax attention in float64 over what the 8 bits stand for: query [B, T, N, H] -> [B, T, N*H]."""
    key, value = (np.repeat(float64(rows), HEADS[0] // HEADS[1], axis=1) for rows in cache)
    scores = np.einsum("btnh,bnsh->bnts", np.asarray(query, np.float64), key) / np.sqrt(SIZE)
    scores = np.where(np.arange(SLOTS) <= np.asarray(positions)[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("bnts,bnsh->btnh", weights / weights.sum(axis=-1, keepdims=True), value)
    return mixed.reshape(*positions.shape, -1)


def test_both_ways_of_a_round_are_attention_over_what_is_kept(case):
    """Kernel and einsum write the same 8 bits; attention to a step of bfloat16 and the rounding of its weights."""
    rows = case.qkv.reshape(1, 2, TOKENS, -1)
    mixed, cache = attention.attend_cached(rows, HEADS, case.rope(case.positions), case.cache, case.positions)
    for found, right in zip(jax.tree.leaves(case.written), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(found, right)
    query, *_ = attention.split_heads(rows[0], HEADS, case.rope(case.positions))
    expected = by_formula(query, cache, case.positions)
    for found in (case.mixed, mixed):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7, atol=2**-8)


def test_a_row_may_be_any_of_a_call(case):
    """Read by itself, behind the rows before it, a row has the bits that it has among the others."""
    for row in (1, TOKENS - 1):
        alone, *_ = case.attended(case.qkv[:, :, row : row + 1], case.written, case.positions[:, row : row + 1])
        np.testing.assert_array_equal(alone[:, 0], case.mixed[:, row])


def test_a_prefill_reads_what_is_kept(case):
    query, *_ = attention.split_heads(case.qkv.reshape(2, TOKENS, -1), HEADS, case.rope(case.positions))
    found = prefill_attention(query, *case.written, case.positions, interpret=True)
    expected = by_formula(query, case.written, case.positions)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7, atol=2**-8)


def test_a_node_of_a_tree_has_the_bits_of_its_path(case):
    """Its attention, its 8 bits and its scale; kept, they lie where decoding plainly would have written them."""
    start = jnp.asarray(STARTS, jnp.int32)
    positions = start[:, None] + DEPTH
    tree = Tree(jnp.broadcast_to(PATHS, (2, *PATHS.shape)), start, room=len(PATHS))
    flat = case.qkv[:, :, : len(PATHS)].reshape(1, -1, *case.qkv.shape[3:])
    mixed, *nodes = tree_attention(flat, case.rope(positions), *case.cache, positions, tree, None, interpret=True)
    path = PATHS[3]
    chained, *written = case.attended(case.qkv[:, :, path], case.cache, start[:, None] + jnp.arange(len(path)))
    np.testing.assert_array_equal(mixed.reshape(2, len(PATHS), -1)[:, 3], chained[:, -1])
    accepted = jnp.broadcast_to(path, (2, len(path)))
    kept = keep_path([tuple(case.cache)], [tuple(nodes)], accepted, start, interpret=True)
    for found, right in zip(jax.tree.leaves(kept), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("size", [32, 8])
def test_a_long_prefill_on_a_gpu(monkeypatch, size):
    """A fresh one: by the kernel, or for heads that it does not take by cuDNN's call; against the einsum."""
    heads, tokens = (2, 1, size), 72
    qkv = jax.random.normal(jax.random.key(0), (1, 1, tokens, 4 * size), jnp.float32)
    (cache,) = attention.init_caches(replace(TINY, num_kv_heads=1, head_dim=size), 1, 1, 128, jnp.float32, "int8")
    positions = jnp.arange(tokens)[None]
    rope = attention.rope_tables(attention.rope_frequencies(size, 10000.0, None), positions)
    expected, written = attention.attend_fresh(qkv, heads, rope, cache, positions)
    monkeypatch.setattr(attention, "has_gpu_kernels", lambda dtype: True)
    monkeypatch.setattr(attention, "CUDNN", "xla")
    monkeypatch.setattr(attention, "attend", None)
    kernel = partial(prefill_attention, interpret=True)
    monkeypatch.setattr(attention.prefill_attention, "prefill_attention", kernel if size == 32 else None)
    found, same = attention.attend_fresh(qkv, heads, rope, cache, positions)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, written)


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("tokens", [4, 72], ids=["round", "prefill"])
def test_a_gpu_gets_kernels_and_no_copy(monkeypatch, kv, tokens):
    """As far as can be seen without one: the program is lowered for it, and holds no cache in the model's dtype."""
    for module in (attention, attention.decode_attention):
        monkeypatch.setattr(module, "has_gpu_kernels", lambda dtype: True)
    (cache,) = attention.init_caches(replace(TINY, num_kv_heads=2, head_dim=32), 1, 2, 1024, jnp.bfloat16, kv)
    qkv, positions = jnp.zeros((1, 2, tokens, 10 * 32), jnp.bfloat16), jnp.zeros((2, tokens), jnp.int32)
    rope = attention.rope_tables(attention.rope_frequencies(32, 10000.0, None), positions)

    def attended(qkv, cache):
        return attention.attend_cached(qkv, HEADS, rope, cache, positions)

    text = gpu_text(jax.jit(attended), qkv, cache)
    assert text.count("gpu.triton") == 1
    assert f"2x2x1024x32x{'i8' if kv == 'int8' else 'f8E4M3FN'}" in text
    assert "2x2x1024x32xbf16" not in text
    assert "2x1024x2x32xbf16" not in text


def test_nothing_else_is_a_format(make_tiny):
    model = make_tiny()
    with pytest.raises(UserError, match=r"^kv must be dtype or int8 or float8, got 'int4'$"):
        model.with_kv("int4")
    assert model.with_kv("int8").kv == "int8"
    assert model.kv == "dtype"
