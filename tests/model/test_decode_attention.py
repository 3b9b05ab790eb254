"""The Pallas kernel, interpreted, against the einsum of `attention.attend`; no bit of a row comes from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model import attention, decode_attention
from dvi_jax.model.decode_attention import CHUNK, WHOLE, cached_attention

TOKENS = 4
# name: query heads, KV heads, head size, cache slots, first position of each batch row
SHAPES = {
    "one query head per KV head, whole": (2, 2, 32, 128, (61, 0)),  # 61 .. 64 cross from one block to the next
    "three, whole": (3, 1, 64, WHOLE, (WHOLE - TOKENS, 300)),
    # Rows that end in different chunks, the last of which is cut short.
    "three, split": (6, 2, 32, WHOLE + 76, (CHUNK - 2, WHOLE + 72)),
}


class Case:
    """Random rows, keys and values in bfloat16, the compiled kernel, and its result for them."""

    def __init__(self, heads, kv_heads, size, slots, starts):
        self.heads, self.size, self.slots = heads, size, slots
        self.starts = np.array(starts, np.int32)
        shapes = (len(starts), TOKENS, heads + 2 * kv_heads, size), *[(len(starts), kv_heads, slots, size)] * 2
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        self.qkv, self.key, self.value = arrays
        self.kernel = jax.jit(lambda *arrays: cached_attention(*arrays, interpret=True))
        self.mixed = self(self.qkv)

    def positions(self, starts):
        positions = jnp.asarray(starts)[:, None] + jnp.arange(TOKENS, dtype=jnp.int32)
        return positions, attention.rope_tables(attention.rope_frequencies(self.size, 10000.0, None), positions)

    def __call__(self, qkv, key=None, value=None, starts=None):
        """The kernel's attention, with some inputs other than the case's."""
        positions, rope = self.positions(self.starts if starts is None else starts)
        key, value = self.key if key is None else key, self.value if value is None else value
        return np.asarray(self.kernel(qkv, rope, key, value, positions))

    def by_einsum(self):
        positions, rope = self.positions(self.starts)
        query = attention.apply_rope(self.qkv[:, :, : self.heads], rope)
        return attention.attend(query, self.key, self.value, attention.cached_mask(positions, self.slots))


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def case(request):
    return Case(*request.param)


def test_equals_the_einsum(case):
    """To a step of bfloat16 (2**-7 of the number) and the rounding of its weights (2**-8)."""
    expected = np.asarray(jax.jit(case.by_einsum)())
    assert case.mixed.dtype == expected.dtype == jnp.bfloat16
    assert np.abs(expected.astype(np.float32)).max() > 0.1
    np.testing.assert_allclose(case.mixed.astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=2**-8)


def test_rows_do_not_meet(case):
    """New queries for one row, and for all of the other batch row: the remaining rows keep every bit."""
    for row in range(TOKENS):
        mixed = case(case.qkv.at[0, row].multiply(-3).at[1].add(1))
        kept = [other for other in range(TOKENS) if other != row]
        np.testing.assert_array_equal(mixed[0, kept], case.mixed[0, kept])
        assert (mixed[0, row] != case.mixed[0, row]).any()


def test_later_slots_do_not_matter(case):
    """What lies behind a row's position, stale but finite, changes no bit of it; what lies at it does."""
    for row in range(TOKENS):
        behind = (np.arange(case.slots) > case.starts[:, None] + row)[:, None, :, None]
        key, value = (jnp.where(behind, jnp.bfloat16(300), array) for array in (case.key, case.value))
        mixed = case(case.qkv, key, value)
        np.testing.assert_array_equal(mixed[:, : row + 1], case.mixed[:, : row + 1])
        assert row == TOKENS - 1 or (mixed[:, row + 1] != case.mixed[:, row + 1]).any(axis=-1).all()


def test_a_row_may_be_any_of_a_call(case):
    """Plain decoding has each row first in a call of its own; speculative decoding has them all in one."""
    for row in range(1, TOKENS):
        mixed = case(jnp.roll(case.qkv, -row, axis=1), starts=case.starts + row)
        np.testing.assert_array_equal(mixed[:, 0], case.mixed[:, row])


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "supported"),
    [
        (4, 128, "bfloat16", True),
        (64, 32, "float16", True),
        (65, 128, "bfloat16", False),  # too many rows for the registers
        (4, 80, "bfloat16", False),  # half a head is no power of two
        (4, 16, "bfloat16", False),  # half a head is too small for a matrix product
        (4, 128, "float32", False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, rows, head_dim, dtype, supported):
    assert not decode_attention.is_supported(rows, head_dim, dtype)  # on the CPU, where this runs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert decode_attention.is_supported(rows, head_dim, dtype) == supported
