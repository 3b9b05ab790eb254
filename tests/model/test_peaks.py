"""The best few of a row of logits, and the sum over all of it: the kernels, interpreted, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dvi_jax.config import MeshConfig
from dvi_jax.decode import vocabulary
from dvi_jax.mesh import MODEL, make_mesh
from dvi_jax.model import peaks as kernels
from dvi_jax.model.peaks import BLOCK, peaks


def logits(*shape):
    """Many are equal, so that their order counts."""
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32).round(1)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("shape", [(2, 40), (1, BLOCK), (3, 2, 5 * BLOCK + 7)], ids=str)
def test_peaks(shape, count):
    rows = logits(*shape)
    values, index, total = peaks(jnp.asarray(rows), count, interpret=True)
    expected = np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(rows, expected, axis=-1))
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(total, np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1), rtol=1e-6)


def test_impossible_tokens():
    """A row may have fewer tokens than are asked for, and whole blocks without any."""
    rows = np.full((2, 3 * BLOCK), -np.inf, np.float32)
    rows[0, 2 * BLOCK + 5] = 3
    rows[1, [7, 9]] = 1e30, -1e30
    values, index, total = peaks(jnp.asarray(rows), 3, interpret=True)
    np.testing.assert_array_equal(values, [[3, -np.inf, -np.inf], [np.float32(1e30), np.float32(-1e30), -np.inf]])
    assert index[0, 0] == 2 * BLOCK + 5
    assert index[1, :2].tolist() == [7, 9]
    np.testing.assert_array_equal(total, [1, 1])


@pytest.mark.parametrize("where", [0, BLOCK + 3])
def test_what_is_no_number_gives_tokens_all_the_same(where):
    rows = logits(1, 2 * BLOCK)
    rows[0, where] = np.nan
    index = np.asarray(peaks(jnp.asarray(rows), 4, interpret=True)[1])
    assert ((index >= 0) & (index < 2 * BLOCK)).all()


@pytest.mark.parametrize("shards", [1, 2])
def test_what_rounds_ask_for(monkeypatch, shards):
    """By the kernels, of one device or of two that have half of the vocabulary each, as by XLA on one.

    Tokens to the last, probabilities to a rounding.
    """
    rows = jnp.asarray(logits(2, 3, 4000))
    by_xla = asked(rows, 1)
    monkeypatch.setattr(vocabulary, "is_supported", lambda: True)
    monkeypatch.setattr(vocabulary, "peaks", partial(kernels.peaks, interpret=True))
    found = asked(rows, shards)
    for index, (one, other) in enumerate(zip(found, by_xla, strict=True)):
        np.testing.assert_allclose(one, other, rtol=0 if index in (0, 2, 3, 5) else 1e-5)


def asked(rows, shards):
    """The best token and its probability; logits and tokens of the best four, and the logsumexp; a verifier's token."""

    def ask(rows):
        of_drafter = *vocabulary.best_and_share(rows, shards), *vocabulary.best_few(rows, 4, shards)
        return *of_drafter, vocabulary.best_of_round(rows, shards)

    if shards == 1:
        return ask(rows)
    mesh = make_mesh(MeshConfig.parse(f"model={shards}"))
    split = PartitionSpec(None, None, MODEL)
    return jax.shard_map(ask, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)(rows)
