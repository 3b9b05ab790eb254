"""The Pallas kernel, interpreted, against the einsum of `attention.attend`; no bit of a row comes from elsewhere."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model import attention, decode_attention
from dvi_jax.model.attention_chunks import CHUNK_SLOTS, UNCUT_SLOTS, combine
from dvi_jax.model.decode_attention import cached_attention
from dvi_jax.model.prefill_attention import prefill_attention

TOKENS = 4
SPARE = 3  # rows that only fill up
# name: parts of the product, query heads, KV heads, head size, cache slots, first position of each batch row, biased
SHAPES = {
    # 61 .. 64 cross a block's end
    "one query head per KV head, parts and a bias, whole": (2, 2, 2, 32, 128, (61, 0), True),
    "three, whole": (2, 3, 1, 64, UNCUT_SLOTS, (UNCUT_SLOTS - TOKENS, 300), False),
    # Rows that end in different chunks, the last of which is cut short.
    "three, split": (4, 6, 2, 32, UNCUT_SLOTS + 76, (CHUNK_SLOTS - 2, UNCUT_SLOTS + 72), False),
}


class Case:
    """Random rows, keys and values, the compiled kernel, and its result for them."""

    def __init__(self, parts, heads, kv_heads, size, slots, starts, biased):
        self.heads, self.kv_heads, self.size, self.slots = heads, kv_heads, size, slots
        self.starts = np.array(starts, np.int32)
        rng = np.random.default_rng(0)
        rows, shape = (parts, len(starts), TOKENS, heads + 2 * kv_heads, size), (len(starts), kv_heads, slots, size)
        rows_dtype = jnp.float32 if parts > 1 or biased else jnp.bfloat16
        self.qkv = jnp.asarray(rng.normal(size=rows) / np.sqrt(parts), rows_dtype)
        self.key, self.value = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
        self.bias = jnp.asarray(rng.normal(size=rows[3:]), jnp.bfloat16) if biased else None
        self.kernel = jax.jit(lambda *arrays: cached_attention(*arrays, interpret=True))

    @cached_property
    def result(self):
        return self(self.qkv)

    @property
    def mixed(self):
        return self.result[0]

    @property
    def cache(self):
        return self.result[1:]

    def positions(self, starts):
        positions = jnp.asarray(starts)[:, None] + jnp.arange(TOKENS, dtype=jnp.int32)
        return positions, attention.rope_tables(attention.rope_frequencies(self.size, 10000.0, None), positions)

    def __call__(self, qkv, cache=None, starts=None):
        """Attention and caches by the kernel, with some inputs other than the case's."""
        positions, rope = self.positions(self.starts if starts is None else starts)
        flat = qkv.reshape(qkv.shape[0], -1, *qkv.shape[3:])
        flat = jnp.pad(flat, ((0, 0), (0, SPARE), (0, 0), (0, 0)))
        arrays = (flat, rope, *(cache or (self.key, self.value)), positions, self.bias)
        mixed, *written = (np.asarray(x) for x in self.kernel(*arrays))
        return [mixed[: positions.size].reshape(*positions.shape, -1), *written]

    def by_einsum(self):
        positions, rope = self.positions(self.starts)
        bias = 0 if self.bias is None else self.bias.astype(jnp.float32)
        whole = (self.qkv.sum(axis=0) + bias).astype(jnp.bfloat16).reshape(len(self.starts), TOKENS, -1)
        query, key, value = attention.split_heads(whole, (self.heads, self.kv_heads, self.size), rope)
        cache = attention.write_rows(attention.LayerCache(self.key, self.value), key, value, positions[:, 0])
        return attention.attend(query, *cache, attention.cached_mask(positions, self.slots)), *cache


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def case(request):
    return Case(*request.param)


def test_equals_the_einsum(case):
    """To a step of bfloat16 (2**-7 of the number) and the rounding of its weights (2**-8); values to the bit."""
    expected = [np.asarray(x) for x in jax.jit(case.by_einsum)()]
    assert np.abs(expected[0].astype(np.float32)).max() > 0.1
    for found, right in zip((case.mixed, *case.cache), expected, strict=True):
        assert found.dtype == right.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), right.astype(np.float32), rtol=2**-7, atol=2**-8)
    np.testing.assert_array_equal(case.cache[1], expected[2])


def test_writes_new_rows_only(case):
    new = case.starts[:, None] <= np.arange(case.slots)
    new &= np.arange(case.slots) < case.starts[:, None] + TOKENS
    for before, after in zip((case.key, case.value), case.cache, strict=True):
        changed = (np.asarray(before) != after).any(axis=(1, 3))
        np.testing.assert_array_equal(changed, new)


def test_rows_do_not_meet(case):
    """Another query changes its own row alone; other keys and values change their row and those after it."""
    for row in range(TOKENS):
        mixed, *cache = case(case.qkv.at[:, 0, row, : case.heads].multiply(-3).at[:, 1].add(1))
        kept = [other for other in range(TOKENS) if other != row]
        np.testing.assert_array_equal(mixed[0, kept], case.mixed[0, kept])
        assert (mixed[0, row] != case.mixed[0, row]).any()
        for found, expected in zip(cache, case.cache, strict=True):
            np.testing.assert_array_equal(found[0], expected[0])
        mixed, *_ = case(case.qkv.at[:, 0, row, case.heads :].multiply(-3))
        np.testing.assert_array_equal(mixed[0, :row], case.mixed[0, :row])
        assert (mixed[0, row:] != case.mixed[0, row:]).any(axis=-1).all()


def test_later_slots_do_not_matter(case):
    """What lies behind the last row, stale but finite, changes no bit; what lies before the first does."""
    slot = np.arange(case.slots)
    for place, matters in ((slot >= case.starts[:, None] + TOKENS, False), (slot < case.starts[:, None], True)):
        cache = [jnp.where(place[:, None, :, None], jnp.bfloat16(3), array) for array in (case.key, case.value)]
        mixed, *_ = case(case.qkv, cache)
        changed = (mixed != case.mixed).any(axis=-1)
        np.testing.assert_array_equal(changed, (matters & place.any(axis=1))[:, None] & np.ones(TOKENS, bool))


def test_a_row_may_be_any_of_a_call(case):
    """Plain decoding has each row first in a call of its own; speculative decoding has them all in one."""
    for row in range(1, TOKENS):
        mixed, *_ = case(jnp.roll(case.qkv, -row, axis=2), case.cache, starts=case.starts + row)
        np.testing.assert_array_equal(mixed[:, 0], case.mixed[:, row])


def test_a_tile_is_16_queries_whatever_else_there_is():
    """Eight rows of three heads are two tiles; each row's result is that of a call of its own."""
    case = Case(1, 3, 1, 32, 128, (61,), biased=False)
    rows = jnp.asarray(np.random.default_rng(9).normal(size=(1, 8, 5, 32)), jnp.bfloat16)
    positions = 61 + jnp.arange(8, dtype=jnp.int32)[None]

    def rope(at):
        return attention.rope_tables(attention.rope_frequencies(32, 10000.0, None), at)

    together, *cache = case.kernel(rows, rope(positions), case.key, case.value, positions, None)
    for row in range(8):
        at = positions[:, row : row + 1]
        alone, *_ = case.kernel(rows[:, row : row + 1], rope(at), *cache, at, None)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "supported"),
    [
        (4, 128, "bfloat16", True),
        (64, 32, "float16", True),
        (65, 128, "bfloat16", False),  # more rows than a round has
        (4, 80, "bfloat16", False),  # half a head is no power of two
        (4, 16, "bfloat16", False),  # half a head is too small for a matrix product
        (4, 128, "float32", False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, rows, head_dim, dtype, supported):
    assert not decode_attention.is_supported(rows, head_dim, dtype)  # on the CPU, where this runs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert decode_attention.is_supported(rows, head_dim, dtype) == supported


@pytest.mark.parametrize("chunks", [3, 40])
def test_chunks_are_put_together(chunks):
    """As one softmax over all of them; a chunk that a row does not reach may hold anything, as may the first of one.

    What such a row has found is there already.
    """
    rng = np.random.default_rng(chunks)
    mixed, total = rng.normal(size=(chunks, 4, 2, 32)), rng.uniform(1, 5, size=(chunks, 4, 2))
    top = rng.normal(size=(chunks, 4, 2)) * 4
    reached = np.array([1, chunks, 2, chunks])
    positions = reached * CHUNK_SLOTS - [1, 1, 512, 200]
    expected = np.empty((4, 2, 32))
    for row, count in enumerate(reached):
        weight = np.exp(top[:count, row] - top[:count, row].max(axis=0))
        sums = (mixed[:count, row] * weight[..., None]).sum(axis=0)
        expected[row] = sums / (total[:count, row] * weight).sum(axis=0)[:, None]
        for array in (mixed, top, total):
            array[count if count > 1 else 0 :, row] = np.nan
    whole = np.full((4, 2, 32), np.nan)
    whole[reached == 1] = expected[reached == 1]
    mixed, top, total, whole = (jnp.asarray(x, jnp.float32) for x in (mixed, top, total, whole))
    at = jnp.asarray(positions, jnp.int32).reshape(2, 2)
    found = combine(mixed, top, total, at, whole, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_prefill_sees_what_lies_before_it():
    """More rows than a round has, behind others: the kernel against the einsum."""
    rng, (batch, tokens, heads, kv_heads, size, slots) = np.random.default_rng(0), (2, 70, 6, 2, 32, 200)
    query = jnp.asarray(rng.normal(size=(batch, tokens, heads, size)), jnp.bfloat16)
    key, value = (jnp.asarray(rng.normal(size=(batch, kv_heads, slots, size)), jnp.bfloat16) for _ in range(2))
    positions = jnp.asarray([[60], [3]]) + jnp.arange(tokens)
    found = prefill_attention(query, key, value, positions, interpret=True)
    expected = attention.attend(query, key, value, attention.cached_mask(positions, slots))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), rtol=2**-7, atol=2**-8)
