"""Kangaroo's acceptance rule against a direct transcription into Python loops."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi_jax.decode.speculative import accept


def by_loop(verified, drafts, count, eos_ids):
    for i, token in enumerate(verified):
        if i == count or token in eos_ids or token != drafts[i]:
            return i + 1, token in eos_ids
    raise AssertionError


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_accept(data):
    tokens = st.integers(0, 3)
    verified = data.draw(st.lists(tokens, min_size=5, max_size=5))
    drafts = data.draw(st.lists(tokens, min_size=5, max_size=5))
    count = data.draw(st.integers(0, 4))
    eos_ids = data.draw(st.sampled_from([(), (2,), (0, 3)]))
    padded = jnp.array([*eos_ids, -1, -1][:2], jnp.int32)
    verdict = accept(jnp.array([verified]), jnp.array([drafts]), jnp.array([count]), padded)
    length, stopped = by_loop(verified, drafts, count, eos_ids)
    assert int(verdict.accept_length[0]) == length
    assert bool(verdict.stopped[0]) == stopped
    judged = [i < min(count, length) for i in range(5)]
    np.testing.assert_array_equal(verdict.judged[0], judged)
    correct = [i < count and v == d for i, (v, d) in enumerate(zip(verified, drafts, strict=True))]
    np.testing.assert_array_equal(verdict.correct[0], correct)
