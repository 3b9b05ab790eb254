"""Drafters: what learning unrolls is what decoding drafts, one step or one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.errors import UserError
from dvi_jax.model.drafters import DRAFTERS, BlockDrafter, BranchRows, Committed, Origin, build_drafter, unrolled
from dvi_jax.model.features import Features
from dvi_jax.presets import TINY

BATCH, TOKENS, WIDTH, STEPS = 2, 14, 4, 3
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
FINAL = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 32)), jnp.float32)
INNER = jnp.asarray(RNG.normal(size=(BATCH, TOKENS, 3, 32)), jnp.float32)  # tapped, of as many layers as TINY has
POSITIONS = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))
OPTIONS = {"block": {"block": 4}}  # no more drafts than the positions here show
ORIGIN = Origin(TINY, norm=jnp.ones(32), key=jax.random.key(1))


def trained(kind: str, options: dict | None = None):
    """A drafter of that kind whose weights have moved: some start at zero, where nothing could be told apart."""
    drafter = build_drafter(kind, OPTIONS.get(kind, {}) if options is None else options, ORIGIN)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(scale=0.1, size=x.shape), x.dtype), drafter)


def seen(drafter, final: jax.Array = FINAL) -> Features:
    """The verifier's features, with the taps that the drafter asks for."""
    inner = INNER[:, :, : len(drafter.taps)] + (final - FINAL)[:, :, None]
    return Features(final, inner if drafter.taps else None)


def rows(x: jax.Array, begin: int, count: int) -> jax.Array:
    """`count` rows from `begin`, and noise in the rest of the width, as rejected rows leave it."""
    noise = jnp.full((BATCH, WIDTH - count, *x.shape[2:]), 7.0)
    return jnp.concatenate([x[:, begin : begin + count], noise], axis=1)


def committed_rows(drafter, begin: int, count: int) -> Committed:
    ones = jnp.ones(BATCH, jnp.int32)
    features = jax.tree.map(lambda x: rows(x, begin, count), seen(drafter))
    return Committed(rows(HIDDEN, begin, count), features, begin * ones, count * ones)


@jax.jit
def unroll(drafter, hidden, final):
    return drafter.unroll(hidden, seen(drafter, final), POSITIONS, STEPS)


@jax.jit
def prefilled(drafter):
    """The drafter's state after 5 positions."""
    before = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1).at[:, 0].set(0)[:, :5], seen(drafter))
    return drafter.prefill(drafter.init_state(BATCH, 20, jnp.float32), HIDDEN[:, :5], before, POSITIONS[:, :5])


@jax.jit
def draft_round(drafter, state, committed, position, other=HIDDEN, wrong=-1):
    """The drafts of one round at `position`: list of [B, D], and the state. At `wrong` it sees the token of `other`."""

    def hidden(at):
        return jax.lax.dynamic_slice_in_dim(jnp.where(at == wrong, other, HIDDEN), at, 1, axis=1)

    if isinstance(drafter, BlockDrafter):
        block, state = drafter.propose(state, committed, hidden(position), drafter.max_drafts)
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
    committed = committed_rows(drafter, 4, 1)
    for position in (5, 5 + accepted):
        drafts, state = draft_round(drafter, state, committed, position)
        for step, draft in enumerate(drafts):
            if position + step < TOKENS:
                expected = unrolled[min(step, len(unrolled) - 1)][:, position + step]
                np.testing.assert_allclose(draft, expected, atol=2e-5)
        committed = committed_rows(drafter, 5, accepted)


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_behind_a_draft_that_was_not_taken(kind):
    """A round at 5 whose draft 0 or 1 is not the text's token: what decoding drafts next is what is learned."""
    drafter = trained(kind)
    other = -HIDDEN[:, ::-1]  # exit hidden states of the tokens drafted in the text's place

    @jax.jit
    def learned(drafter, position):
        rows = jax.lax.dynamic_slice_in_dim(other, position, 1, axis=1)
        branches = BranchRows(rows, jnp.full((BATCH, 1), position))
        return drafter.unroll_branches(HIDDEN, seen(drafter), POSITIONS, STEPS, branches)

    for wrong in range(2):
        drafts, behind = jax.device_get(learned(drafter, 6 + wrong))
        for ours, text in zip(drafts, unroll(drafter, HIDDEN, FINAL), strict=True):
            np.testing.assert_allclose(ours, text, atol=2e-5)
        found, _ = draft_round(drafter, prefilled(drafter), committed_rows(drafter, 4, 1), 5, other, 6 + wrong)
        expected = behind[min(wrong, len(behind) - 1)][:, 0]
        np.testing.assert_allclose(found[1 + wrong], expected, atol=2e-5)


@pytest.mark.parametrize("kind", sorted(DRAFTERS))
def test_unroll_is_causal(kind):
    """Changing a position changes no draft before it, and every draft that may know of it."""
    drafter = trained(kind)
    changed = HIDDEN.at[:, 9].add(1.0), FINAL.at[:, 9].add(1.0)
    before, after = jax.device_get((unroll(drafter, HIDDEN, FINAL), unroll(drafter, *changed)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, :9], b[:, :9])
        assert np.abs(a[:, 9:] - b[:, 9:]).max() > 1e-3


def test_fused_with_inner_layers():
    """Decoding and learning agree with taps too, and each tap has a say."""
    drafter = trained("fused", {"taps": [1, 3]})
    assert drafter.taps == (1, 3)
    expected = jax.device_get(unroll(drafter, HIDDEN, FINAL))
    drafts, _ = draft_round(drafter, prefilled(drafter), committed_rows(drafter, 4, 1), 5)
    for step, draft in enumerate(drafts):
        np.testing.assert_allclose(draft, expected[step][:, 5 + step], atol=2e-5)
    features = seen(drafter)
    first_draft = jax.jit(lambda taps: drafter.unroll(HIDDEN, features._replace(taps=taps), POSITIONS, 1)[0])
    for tap in range(2):
        moved = np.array(features.taps)
        moved[:, :, tap] *= -1
        assert np.abs(first_draft(moved) - expected[0]).max() > 1e-2
    with pytest.raises(UserError, match=r"taps must be ascending layer numbers between 1 and 3, got \[4\]"):
        trained("fused", {"taps": [4]})


def test_the_sequential_head():
    """A gated product of the rows of two matrices, in the columns that may be drafted; nothing before it is trained."""
    drafter = trained("block", {"markov_rank": 3})
    draft_hidden = HIDDEN[:, 0]
    logits, previous, columns = (
        jnp.asarray(RNG.normal(size=(BATCH, 5)), jnp.float32),
        jnp.array([7, 40]),
        [3, 9, 11, 40, 63],
    )
    before, after, gate = (
        np.asarray(getattr(drafter, f"markov_{name}")[...], np.float64) for name in ("before", "after", "gate")
    )
    both = np.concatenate([np.asarray(draft_hidden, np.float64), before[[7, 40]]], axis=1)
    expected = logits + (before[[7, 40]] / (1 + np.exp(-both @ gate.T))) @ after[columns].T
    corrected = drafter.corrected(logits, draft_hidden, previous, jnp.array(columns))
    np.testing.assert_allclose(corrected, expected, atol=1e-5)
    fresh = build_drafter("block", {"markov_rank": 3}, ORIGIN)
    np.testing.assert_array_equal(fresh.corrected(logits, draft_hidden, previous, jnp.array(columns)), logits)
    without = build_drafter("block", {"markov_rank": 0}, ORIGIN)
    np.testing.assert_array_equal(without.corrected(logits, draft_hidden, previous, None), logits)


def test_attention_of_blocks(monkeypatch):
    """Against softmax over the keys that each row may see, listed one by one; in pieces as in one."""
    rng, tokens, drafts = np.random.default_rng(3), 7, 3
    query = rng.normal(size=(2, tokens * drafts, 4, 8))
    key, value = rng.normal(size=(2, 2, 2, tokens, 8))
    own_key, own_value = rng.normal(size=(2, 2, 2, tokens * drafts, 8))
    expected = np.zeros((2, tokens * drafts, 4, 8))
    for b, row, head in np.ndindex(2, tokens * drafts, 4):
        position, begin = row // drafts, row - row % drafts
        keys = np.concatenate([key[b, head // 2, : position + 1], own_key[b, head // 2, begin : row + 1]])
        values = np.concatenate([value[b, head // 2, : position + 1], own_value[b, head // 2, begin : row + 1]])
        scores = np.exp(keys @ query[b, row, head] / np.sqrt(8))
        expected[b, row, head] = scores @ values / scores.sum()
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value, own_key, own_value)]
    for at_once in (128, 3):
        monkeypatch.setattr(unrolled, "POSITIONS_AT_ONCE", at_once)
        mixed = jax.jit(lambda *arrays: unrolled.attend_blocks(*arrays))(*arrays)
        np.testing.assert_allclose(mixed, expected.reshape(2, tokens * drafts, -1), atol=1e-5)


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
    block, _ = drafter.propose((), committed_rows(drafter, 4, 2), HIDDEN[:, :1], 3)
    h, weights = np.asarray(FINAL[:, 5], np.float64), np.asarray(drafter.blocks[...], np.float64)
    for j in range(3):
        x = h @ weights[j].T
        np.testing.assert_allclose(block[:, j], h + x / (1 + np.exp(-x)), atol=1e-5)
    logits, previous = jnp.asarray(RNG.normal(size=(BATCH, 5)), jnp.float32), jnp.array([7, 40])
    vocabulary = np.array([0, 3, 9, 40, 63])
    after, before = np.asarray(drafter.markov_after[...]), np.asarray(drafter.markov_before[...])
    expected = np.asarray(logits) + before[[7, 40]] @ after[vocabulary].T
    np.testing.assert_allclose(
        drafter.corrected(logits, block[:, 0], previous, jnp.asarray(vocabulary)), expected, atol=1e-5
    )
    whole = drafter.corrected(jnp.zeros((BATCH, 64)), block[:, 0], previous, None)
    np.testing.assert_allclose(whole, before[[7, 40]] @ after.T, atol=1e-5)


def test_a_fresh_medusa_is_the_lm_head():
    """Untrained, every head gives the verifier's own final hidden state."""
    drafter = build_drafter("medusa", {"markov_rank": 2}, ORIGIN)
    for j, draft in enumerate(jax.device_get(unroll(drafter, HIDDEN, FINAL))):
        np.testing.assert_array_equal(draft[:, j + 1 :], np.asarray(FINAL)[:, : -j - 1])
    logits = jnp.ones((BATCH, 64))
    np.testing.assert_array_equal(drafter.corrected(logits, HIDDEN[:, 0], jnp.array([1, 2]), None), logits)


def test_unknown_drafter_and_option():
    with pytest.raises(UserError, match="unknown drafter 'eagle'; known: block, exit_head, fused, kangaroo, medusa"):
        build_drafter("eagle", {}, ORIGIN)
    with pytest.raises(UserError, match=r"drafter fused: unknown key rank"):
        build_drafter("fused", {"rank": 4}, ORIGIN)
    with pytest.raises(UserError, match="heads must be between 1 and 16, got 17"):
        build_drafter("medusa", {"heads": 17}, ORIGIN)
