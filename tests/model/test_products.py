"""Products in parts against NumPy, and into how many parts they are cut."""

import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model.products import linear, part_count, split_linear, total


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_add_up(dtype, count):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(2, 3, 64)), dtype), jnp.asarray(rng.normal(size=(5, 64)), dtype)
    wide = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    parts = split_linear(x, weight, count)
    assert parts.shape == (count, 2, 3, 5)
    pieces = [np.split(array, count, axis=-1) for array in wide]
    expected = np.stack([row @ column.T for row, column in zip(*pieces, strict=True)])
    step = 2.0**-8 if parts.dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(parts, np.float64), expected, rtol=step, atol=1e-5)
    whole = np.asarray(total(parts, x.dtype), np.float64)
    np.testing.assert_allclose(whole, wide[0] @ wide[1].T, rtol=2.0**-8 if dtype == "bfloat16" else 1e-6, atol=1e-5)
    if count == 1:
        np.testing.assert_array_equal(parts[0], linear(x, weight))


@pytest.mark.parametrize(
    ("rows", "shape", "count"),
    [
        (6, (12288, 4096), 2),
        (1, (4096, 11008), 4),
        (6, (22016, 4096), 1),  # enough results as it is
        (17, (4096, 4096), 1),  # too many rows
        (5, (576, 576), 4),  # eight parts would be of 72 terms
        (5, (576, 1000), 1),  # halves would be of 500 terms: no multiple of 16
        (1, (32, 32), 1),
    ],
)
def test_part_count(rows, shape, count):
    assert part_count(rows, shape) == count
    assert shape[1] % count == 0
