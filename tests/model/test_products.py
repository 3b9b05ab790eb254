"""Products in float32 sums, and sums of parts, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model.products import linear, total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_and_total(dtype):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(2, 3, 64)), dtype), jnp.asarray(rng.normal(size=(5, 64)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    step = {"rtol": 2.0**-8 if dtype == "bfloat16" else 1e-6, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(linear(x, weight), np.float64), expected, **step)
    parts = jnp.stack(
        [linear(x[..., :32], weight[:, :32], jnp.float32), linear(x[..., 32:], weight[:, 32:], jnp.float32)]
    )
    np.testing.assert_allclose(np.asarray(total(parts, x.dtype), np.float64), expected, **step)
    biased = np.asarray(total(parts, x.dtype, jnp.arange(5, dtype=dtype)), np.float64)
    np.testing.assert_allclose(biased, expected + np.arange(5), **step)


@pytest.mark.parametrize("rows", [1, 40])
def test_parts_are_added_one_after_the_other(rows):
    """In that order, to the bit, as the kernels add them; nothing is left to how a compiler reduces."""
    parts = np.random.default_rng(0).normal(size=(4, rows, 48)).astype(np.float32)
    program = jax.jit(total, static_argnums=1)
    np.testing.assert_array_equal(program(parts, jnp.float32), ((parts[0] + parts[1]) + parts[2]) + parts[3])
    assert "reduce" not in program.lower(parts, jnp.float32).as_text()
