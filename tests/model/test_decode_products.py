"""The kernels of a round's products, interpreted, against NumPy in float64; rows do not meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model import decode_products
from dvi_jax.model.decode_products import gated_product, product
from dvi_jax.model.product_blocks import blocks_for, padded_rows, part_count

# rows, results, terms, parts: whole blocks and steps, and none of them whole
SHAPES = [(16, 64, 192, 1), (32, 40, 576, 3), (128, 33, 100, 1)]


def arrays(rows, out, width):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(size, width)), jnp.bfloat16) for size in (rows, out))


@pytest.mark.parametrize(("rows", "out", "width", "parts"), SHAPES)
def test_parts_of_a_product(rows, out, width, parts):
    x, weight = arrays(rows, out, width)
    found = product(x, weight, parts=parts, out_dtype=jnp.float32, interpret=True)
    pieces = [np.split(np.asarray(array, np.float64), parts, axis=1) for array in (x, weight)]
    expected = np.stack([left @ right.T for left, right in zip(*pieces, strict=True)])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    # One other row changes its own results and no bit of another's.
    changed = product(x.at[3].multiply(-2), weight, parts=parts, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal((np.asarray(found) != changed).any(axis=(0, 2)), np.arange(rows) == 3)


@pytest.mark.parametrize(("rows", "wanted"), [(16, 1), (16, 16), (128, 70)])
def test_rows_that_nobody_wants(rows, wanted):
    """Those that fill up a tile are not written; it changes no bit of the others."""
    x, weight = arrays(rows, 40, 576)
    every = product(x, weight, parts=3, interpret=True)
    some = product(x, weight, parts=3, wanted=wanted, interpret=True)
    np.testing.assert_array_equal(some, every[:, :wanted])


def test_a_product_is_rounded_once():
    x, weight = arrays(16, 64, 192)
    wide = product(x, weight, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(product(x, weight, interpret=True), wide.astype(jnp.bfloat16))


def test_swiglu_rounds_each_step():
    x, weight = arrays(16, 80, 192)
    gate, up = jnp.split(product(x, weight, interpret=True)[0], 2, axis=1)
    wide = np.asarray(gate, np.float64)
    silu = (wide / (1 + np.exp(-wide))).astype(jnp.bfloat16).astype(np.float64)
    expected = (silu * np.asarray(up, np.float64)).astype(jnp.bfloat16)
    found = gated_product(x, weight, interpret=True)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2.0**-7, atol=0)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((12288, 4096), 1),  # 192 blocks of 64 results are enough as they are
        ((4096, 11008), 2),
        ((1536, 1536), 3),
        ((576, 576), 3),  # four parts would be of less than 192 terms
        ((576, 1536), 4),
        ((576, 1000), 1),  # no equal parts of whole steps
        ((32, 32), 1),
    ],
)
def test_part_count(shape, count):
    assert part_count(shape) == count
    assert shape[1] % count == 0
    assert {blocks_for(shape, count, rows).parts for rows in (16, 64, 256)} == {count}  # what the bits depend on


def test_rows_fill_up_to_whole_tiles():
    assert [padded_rows(n) for n in (1, 16, 17, 32, 33, 64, 65, 256)] == [16, 16, 32, 32, 64, 64, 128, 256]


def test_what_the_kernels_take(monkeypatch):
    assert not decode_products.is_supported(6, jnp.bfloat16)  # on the CPU, where this runs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert decode_products.is_supported(6, jnp.bfloat16)
    assert not decode_products.is_supported(6, jnp.float32)
    assert not decode_products.is_supported(257, jnp.bfloat16)
