"""Drafters: what learning unrolls is what decoding drafts, one step or one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.model.drafters import DRAFTERS, BlockDrafter, Committed, Origin, build_drafter
from dvi_jax.model.features import Features
from dvi_jax.presets import TINY

BATCH, TOKENS, WIDTH, STEPS = 2, 14, 4, 3
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
FINAL = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))
ORIGIN = Origin(TINY, norm=jnp.ones(32), key=jax.random.key(1))


def trained(kind: str, options: dict | None = None):
    """A drafter of that kind whose weights have moved: some start at zero, where nothing could be told apart."""
    drafter = build_drafter(kind, options or {}, ORIGIN)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(scale=0.1, size=x.shape), x.dtype), drafter)


def rows(x: jax.Array, begin: int, count: int) -> jax.Array:
    """`count` rows from `begin`, and noise in the rest of the width, as rejected rows leave it."""
    noise = jnp.full((BATCH, WIDTH - count, 32), 7.0)
    return jnp.concatenate([x[:, begin : begin + count], noise], axis=1)


def committed_rows(begin: int, count: int) -> Committed:
    ones = jnp.ones(BATCH, jnp.int32)
    return Committed(rows(HIDDEN, begin, count), Features(rows(FINAL, begin, count)), begin * ones, count * ones)


@jax.jit
def unroll(drafter, hidden, final):
    return drafter.unroll(hidden, Features(final), POSITIONS, STEPS)


@jax.jit
def prefilled(drafter):
    """The drafter's state after 5 positions."""
    before = Features(jnp.pad(FINAL[:, :4], ((0, 0), (1, 0), (0, 0))))
    return drafter.prefill(drafter.init_state(BATCH, 20, jnp.float32), HIDDEN[:, :5], before, POSITIONS[:, :5])


@jax.jit
def draft_round(drafter, state, committed, position):
    """The drafts of one round at `position`: list of [B, D], and the state."""

    def hidden(at):
        return jax.lax.dynamic_slice_in_dim(HIDDEN, at, 1, axis=1)

    if isinstance(drafter, BlockDrafter):
        state = drafter.absorb(state, committed)
        block = drafter.propose(state, committed, hidden(position))
        return [block[:, j] for j in range(block.shape[1])], state
    drafts = []
    for step in range(STEPS):
        at, row = jnp.full(BATCH, position + step), hidden(position + step)
        if step == 0:
            draft_hidden, state = drafter.first(state, committed, row, at)
        else:
            draft_hidden, state = drafter.next(state, draft_hidden, row, at[:, None])
        drafts.append(draft_hidden[:, 0])
    return drafts, state


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_unroll_equals_decoding(kind, accepted):
    """Prefill 5 positions, draft a round at 5, commit `accepted` of its rows, draft the next round."""
    drafter = trained(kind)
    unrolled = jax.device_get(unroll(drafter, HIDDEN, FINAL))
    state = prefilled(drafter)
    committed = committed_rows(4, 1)
    for position in (5, 5 + accepted):
        drafts, state = draft_round(drafter, state, committed, position)
        for step, draft in enumerate(drafts):
            if position + step < TOKENS:
                expected = unrolled[min(step, len(unrolled) - 1)][:, position + step]
                np.testing.assert_allclose(draft, expected, atol=2e-5)
        committed = committed_rows(5, accepted)


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_unroll_is_causal(kind):
    """Changing a position changes no draft before it, and every draft that may know of it."""
    drafter = trained(kind)
    changed = HIDDEN.at[:, 9].add(1.0), FINAL.at[:, 9].add(1.0)
    before, after = jax.device_get((unroll(drafter, HIDDEN, FINAL), unroll(drafter, *changed)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, :9], b[:, :9])
        assert np.abs(a[:, 9:] - b[:, 9:]).max() > 1e-3


def test_fresh_exit_head_is_the_base_head():
    """Untrained, lora_S and scale change nothing: the base norm and head on the exit hidden state."""
    origin = Origin(TINY, norm=jnp.full(32, 0.5), key=jax.random.key(1))
    drafter = build_drafter("exit_head", {"rank": 4}, origin)
    head = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
    (draft,) = unroll(drafter, HIDDEN, FINAL)
    x = np.asarray(HIDDEN, np.float64)
    expected = 0.5 * x / np.sqrt((x * x).mean(-1, keepdims=True) + TINY.rms_norm_eps) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(drafter.logits(draft, head), expected, atol=1e-4)


def test_medusa_heads_are_residual_blocks():
    """Head j is h + SiLU(W_j h); its bigram term is a product of two rows, in the columns that may be drafted."""
    drafter = trained("medusa", {"heads": 3, "markov_rank": 2})
    block = drafter.propose((), committed_rows(4, 2), HIDDEN[:, :1])
    h, weights = np.asarray(FINAL[:, 5], np.float64), np.asarray(drafter.blocks[...], np.float64)
    for j in range(3):
        x = h @ weights[j].T
        np.testing.assert_allclose(block[:, j], h + x / (1 + np.exp(-x)), atol=1e-5)
    logits, previous = jnp.asarray(RNG.normal(size=(BATCH, 5)), jnp.float32), jnp.array([7, 40])
    vocabulary = np.array([0, 3, 9, 40, 63])
    after, before = np.asarray(drafter.markov_after[...]), np.asarray(drafter.markov_before[...])
    expected = np.asarray(logits) + before[[7, 40]] @ after[vocabulary].T
    np.testing.assert_allclose(drafter.corrected(logits, previous, jnp.asarray(vocabulary)), expected, atol=1e-5)
    whole = drafter.corrected(jnp.zeros((BATCH, 64)), previous, None)
    np.testing.assert_allclose(whole, before[[7, 40]] @ after.T, atol=1e-5)


def test_a_fresh_medusa_is_the_lm_head():
    """Untrained, every head gives the verifier's own final hidden state."""
    drafter = build_drafter("medusa", {"markov_rank": 2}, ORIGIN)
    for j, draft in enumerate(jax.device_get(unroll(drafter, HIDDEN, FINAL))):
        np.testing.assert_array_equal(draft[:, j + 1 :], np.asarray(FINAL)[:, : -j - 1])
    logits = jnp.ones((BATCH, 64))
    np.testing.assert_array_equal(drafter.corrected(logits, jnp.array([1, 2]), None), logits)


def test_unknown_drafter_and_option():
    with pytest.raises(UserError, match="unknown drafter 'eagle'; known: exit_head, fused, kangaroo, medusa"):
        build_drafter("eagle", {}, ORIGIN)
    with pytest.raises(UserError, match=r"drafter fused: unknown key rank"):
        build_drafter("fused", {"rank": 4}, ORIGIN)
    with pytest.raises(UserError, match="heads must be between 1 and 16, got 17"):
        build_drafter("medusa", {"heads": 17}, ORIGIN)
