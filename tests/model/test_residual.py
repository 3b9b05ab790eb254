"""Sum and norm in one kernel, interpreted, against NumPy and against the same in several steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.model import residual as module
from dvi_jax.model.residual import Residual, add_and_norm, rms_norm

EPS = 1e-5


def arrays(parts, size):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((6, size), (size,)))
    return x, jnp.asarray(rng.normal(size=(parts, 6, size)), jnp.float32 if parts > 1 else jnp.bfloat16), weight


@pytest.mark.parametrize(("parts", "size"), [(1, 64), (4, 96), (2, 1000)])
def test_kernel_equals_the_formula(parts, size):
    """The sum to the bit (in float64, rounded twice as the steps do); the norm to a step of bfloat16."""
    x, added, weight = arrays(parts, size)
    summed, normed = add_and_norm(x, added, weight, EPS, interpret=True)
    product = np.asarray(added, np.float64).sum(0).astype(jnp.bfloat16)
    expected = (np.asarray(x, np.float64) + product.astype(np.float64)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(summed), expected)
    wide = expected.astype(np.float64)
    formula = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    np.testing.assert_allclose(np.asarray(normed, np.float64), formula, rtol=2.0**-6, atol=0)
    np.testing.assert_array_equal(normed, rms_norm(summed, weight, EPS))


def test_rows_do_not_meet():
    x, added, weight = arrays(2, 96)
    before = add_and_norm(x, added, weight, EPS, interpret=True)
    after = add_and_norm(x.at[5].multiply(-2), added.at[:, 5].add(1), weight, EPS, interpret=True)
    for old, new in zip(before, after, strict=True):
        same = np.asarray(old == new).all(axis=-1)
        np.testing.assert_array_equal(same, [True] * 5 + [False])


def test_nothing_is_added_to_rows_that_only_fill_up(monkeypatch):
    """Parts of the first four rows of six, as devices hand them to each other."""
    monkeypatch.setattr(module, "add_and_norm", lambda *args: add_and_norm(*args, interpret=True))
    x, added, weight = arrays(2, 96)
    everything = Residual(x, kernels=True).plus(added.at[:, 4:].set(0))
    few = Residual(x, kernels=True).plus(added[:, :4])
    np.testing.assert_array_equal(few.total(), everything.total())
    for one, other in zip(few.normed(weight, EPS), everything.normed(weight, EPS), strict=True):
        np.testing.assert_array_equal(getattr(one, "x", one), getattr(other, "x", other))


@pytest.mark.parametrize("kernels", [False, True])
def test_residual_stream(monkeypatch, kernels):
    """With kernels or without, a stream is its start and everything added, each product rounded before it is added."""
    monkeypatch.setattr(module, "add_and_norm", lambda *args: add_and_norm(*args, interpret=True))
    x, first, weight = arrays(1, 96)
    _, second, _ = arrays(4, 96)
    stream = Residual(x, kernels=kernels)
    stream, normed = stream.normed(weight, EPS)
    np.testing.assert_array_equal(normed, rms_norm(x, weight, EPS))
    stream, _ = stream.plus(first).normed(weight, EPS)
    stream, normed = stream.plus(second).normed(weight, EPS)
    expected = x + first[0] + jnp.sum(second, axis=0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stream.total(), expected)
    np.testing.assert_array_equal(normed, rms_norm(expected, weight, EPS))
