"""Drafters: what learning unrolls is what decoding drafts, one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.model.drafters import DRAFTERS, Committed, build_drafter
from dvi_jax.presets import TINY

BATCH, TOKENS, WIDTH, STEPS = 2, 14, 4, 3
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
FEATURE = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))


def rows(x: jax.Array, begin: int, count: int) -> jax.Array:
    """`count` rows from `begin`, and noise in the rest of the width, as rejected rows leave it."""
    noise = jnp.full((BATCH, WIDTH - count, 32), 7.0)
    return jnp.concatenate([x[:, begin : begin + count], noise], axis=1)


def draft_round(drafter, state, previous, position):
    """The drafts of one round at `position`: list of [B, D], and the state."""
    drafts = []
    for step in range(STEPS):
        at, row = jnp.full(BATCH, position + step), HIDDEN[:, position + step : position + step + 1]
        if step == 0:
            feature, state = drafter.first(state, previous, row, at)
        else:
            feature, state = drafter.next(state, feature, row, at)
        drafts.append(feature[:, 0])
    return drafts, state


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_unroll_equals_decoding(kind, accepted):
    """Prefill 5 positions, draft a round at 5, commit `accepted` of its rows, draft the next round."""
    drafter = build_drafter(kind, TINY, {}, key=jax.random.key(1), norm=jnp.ones(32))
    unrolled = drafter.unroll(HIDDEN, FEATURE, POSITIONS, STEPS)
    state = drafter.init_state(BATCH, 20, jnp.float32)
    before = jnp.pad(FEATURE[:, :4], ((0, 0), (1, 0), (0, 0)))
    state = drafter.prefill(state, HIDDEN[:, :5], before, POSITIONS[:, :5])
    ones = jnp.ones(BATCH, jnp.int32)
    previous = Committed(rows(HIDDEN, 4, 1), rows(FEATURE, 4, 1), 4 * ones, ones)
    for position in (5, 5 + accepted):
        drafts, state = draft_round(drafter, state, previous, position)
        for step, draft in enumerate(drafts):
            expected = unrolled[min(step, len(unrolled) - 1)][:, position + step]
            np.testing.assert_allclose(draft, expected, atol=2e-5)
        previous = Committed(rows(HIDDEN, 5, accepted), rows(FEATURE, 5, accepted), 5 * ones, accepted * ones)


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_unroll_is_causal(kind):
    """Changing a position changes no draft before it."""
    drafter = build_drafter(kind, TINY, {}, key=jax.random.key(1), norm=jnp.ones(32))
    before = drafter.unroll(HIDDEN, FEATURE, POSITIONS, STEPS)
    after = drafter.unroll(HIDDEN.at[:, 9].add(1.0), FEATURE.at[:, 9].add(1.0), POSITIONS, STEPS)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, :9], b[:, :9])
        assert np.abs(a[:, 9:] - b[:, 9:]).max() > 1e-3


def test_fresh_exit_head_is_the_base_head():
    """Untrained, lora_S and scale change nothing: the base norm and head on the exit hidden state."""
    drafter = build_drafter("exit_head", TINY, {"rank": 4}, key=jax.random.key(1), norm=jnp.full(32, 0.5))
    head = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
    (draft,) = drafter.unroll(HIDDEN, FEATURE, POSITIONS, STEPS)
    x = np.asarray(HIDDEN, np.float64)
    expected = 0.5 * x / np.sqrt((x * x).mean(-1, keepdims=True) + TINY.rms_norm_eps) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(drafter.logits(draft, head), expected, atol=1e-4)


def test_unknown_drafter_and_option():
    with pytest.raises(UserError, match="unknown drafter 'eagle'; known: exit_head, fused, kangaroo"):
        build_drafter("eagle", TINY, {}, key=jax.random.key(0), norm=jnp.ones(32))
    with pytest.raises(UserError, match=r"drafter fused: .*rank"):
        build_drafter("fused", TINY, {"rank": 4}, key=jax.random.key(0), norm=jnp.ones(32))
