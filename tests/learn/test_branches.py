"""Drafts that were verified and not taken: what is kept of them, and what is learned from it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig, ObjectiveConfig, OptimizerConfig
from dvi_jax.decode.branches import NO_BRANCH, Branches
from dvi_jax.errors import UserError
from dvi_jax.learn.fast_update import Batch, evaluate_positions, fast_update, init_learner
from dvi_jax.learn.replay import Replay, WindowBranches, Windows, check_branches, push
from dvi_jax.learn.rollout import rollout, window_length
from dvi_jax.loading import build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.serve.learning import newest_positions

PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 4]]
ROOM = 24
CHAIN = DecodeConfig(draft_steps=3, max_new_tokens=24)
TREE = DecodeConfig(draft_steps=7, plan="tree:8", max_new_tokens=24)
OBJECTIVE = ObjectiveConfig(warmup=1000, learn_from_prompt=False)


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny()


@pytest.fixture(scope="module")
def windows(model):
    return rollout(model, PROMPTS, CHAIN, longest_prompt=8, branches=ROOM)[0]


@pytest.fixture(scope="module")
def verifier(model):
    """verifier(tokens int32 [M, 32]): exit and final hidden states of whole rows, without caches."""

    @jax.jit
    def run(tokens):
        llama, positions = join(model.definition, model.params).llama, jnp.broadcast_to(jnp.arange(32), tokens.shape)
        hidden = llama.shallow(tokens, None, positions)[0]
        return hidden, llama.deep(hidden, None, positions)[0]

    return run


def check_states(windows, verifier):
    """Every branch has the states of the text before it with the draft in place of the text's token."""
    windows, found = jax.device_get(windows), []
    for row in range(len(PROMPTS)):
        for place in np.flatnonzero(windows.branches.token[row] != NO_BRANCH):
            position, token = int(windows.branches.position[row, place]), int(windows.branches.token[row, place])
            assert position < int(windows.length[row])
            assert token != windows.tokens[row, position]
            found.append((row, place, position, token))
    rows = np.zeros((96, 32), np.int32)
    for line, (row, _, position, token) in zip(rows, found, strict=False):
        line[:position], line[position] = windows.tokens[row, :position], token
    hidden, final = jax.device_get(verifier(rows))
    for line, (row, place, position, _) in enumerate(found):
        kept = windows.branches
        for ours, expected in ((kept.hidden, hidden), (kept.final, final)):  # bfloat16 against float32
            np.testing.assert_allclose(ours[row, place].astype(np.float32), expected[line, position], 2**-8, 1e-3)
    return found


def test_of_a_chain_every_first_reject_is_kept(windows, verifier):
    found = check_states(windows, verifier)
    kept = {(row, position): token for row, _, position, token in found}
    rejected = np.argwhere(np.asarray(windows.reward) == 0)
    assert kept == {(row, p): int(windows.proposal[row, p]) for row, p in rejected}
    assert len(kept) > 10


def test_of_a_tree_what_stood_beside_the_path_is_kept(model, verifier):
    """Up to two drafts of a position, among them every first choice that was wrong."""
    windows, _ = rollout(model, PROMPTS, TREE, longest_prompt=8, branches=48)
    found = check_states(windows, verifier)
    tokens = {}
    for row, _, position, token in found:
        tokens.setdefault((row, position), []).append(token)
    assert all(len(set(each)) == len(each) <= 2 for each in tokens.values())
    assert max(map(len, tokens.values())) == 2
    rejected = np.argwhere(np.asarray(windows.reward) == 0)
    assert all(int(windows.proposal[row, p]) in tokens[row, p] for row, p in rejected)


def test_of_too_many_evenly_spread_ones_are_kept():
    """Nine within the window, room for four: the first of every fourth part. The tenth is behind the window's end."""
    tokens = np.full((1, 12, 1), NO_BRANCH)
    tokens[0, 2:, 0] = np.arange(2, 12)
    states = tokens[..., None].astype(np.float32)
    of = jax.jit(lambda length: WindowBranches.of(Branches(*map(jnp.asarray, (tokens, states, states))), length, 4))
    kept = of(np.array([10]))
    assert kept.token[0].tolist() == [2, 5, 7, 9]
    assert kept.position[0].tolist() == [1, 4, 6, 8]
    assert kept.final[0, :, 0].tolist() == [2, 5, 7, 9]
    few = of(np.array([4]))
    assert few.token[0].tolist() == [2, 3, 4, NO_BRANCH]


def test_they_are_learned_from_beside_the_text(model, windows):
    """Rows that may be drawn are the text's and the branches'; of a branch there is neither proposal nor reward."""

    @jax.jit
    def positions(windows):
        nothing, key = jnp.zeros(2, bool), jax.random.key(0)
        return evaluate_positions(join(model.definition, model.params), windows, nothing, key, OBJECTIVE, 100)

    picked, branches = jax.device_get((positions(windows), windows.branches))
    known = int((branches.token != NO_BRANCH).sum())
    beside = (picked.valid == 1) & (picked.in_text == 0)
    assert picked.valid.sum() == 23 + 23 + known
    assert beside.sum() == known
    assert set(picked.reward[beside]) == set(picked.proposal[beside]) == {-1}
    # The verifier's target of each is its own final hidden state through the head.
    llama = join(model.definition, model.params).llama
    expected = llama.logits(windows.branches.final.astype(jnp.float32))[branches.token != NO_BRANCH]
    found = picked.verifier_logits[beside]
    np.testing.assert_allclose(np.sort(found.sum(axis=1)), np.sort(np.asarray(expected).sum(axis=1)), atol=1e-3)


def test_an_update_learns_what_follows_wrong_drafts(model, windows):
    """From branches alone: the divergence behind them falls."""
    optimizer = OptimizerConfig(lora_lr=5e-3, head_lr=5e-3, warmup=0)
    alone = windows.replace(prompt_length=windows.length)  # no position of the text is learned from
    window = window_length(CHAIN, 8)
    replay = push(Replay.empty(4, window, 32, branches=ROOM), alone)
    learner, found = init_learner(model.params, optimizer, replay, jax.random.key(0)), []
    for _ in range(30):
        learner, metrics = fast_update(
            model.definition,
            model.params,
            learner,
            alone,
            jnp.array(False),
            objective=OBJECTIVE,
            optimizer=optimizer,
            size=Batch(0, 2, 60),
        )
        found.append(float(metrics["kl"]))
    assert found[-1] < 0.7 * found[0]
    assert float(metrics["agreement"]) == 0  # that is of the text


def test_a_window_that_is_cut_keeps_the_place_of_its_branches(windows):
    """A server keeps the newest positions of a reply."""
    one = jax.tree.map(lambda x: x[:1], windows)
    cut = int(one.length[0]) - 16
    replay = push(Replay.empty(2, 16, 32, branches=ROOM), newest_positions(one, 16))
    kept, before = jax.device_get((replay.windows, one))
    np.testing.assert_array_equal(kept.branches.position[0], before.branches.position[0] - cut)
    inside = (kept.branches.token[0] != NO_BRANCH) & (kept.branches.position[0] >= 0)
    for position, token in zip(kept.branches.position[0][inside], kept.branches.token[0][inside], strict=True):
        assert kept.proposal[0, position] == token


def test_a_window_that_is_not_finite_is_left_out(windows):
    broken = windows.branches.replace(final=windows.branches.final.at[0, 0].set(jnp.nan))
    window = windows.tokens.shape[1]
    replay = push(Replay.empty(2, window, 32, branches=ROOM), windows.replace(branches=broken))
    assert replay.windows.length.tolist()[0] == 0
    assert replay.windows.length.tolist()[1] > 0
    assert bool(jnp.isfinite(replay.windows.branches.final.astype(jnp.float32)).all())
    assert isinstance(replay.windows, Windows)


def test_where_the_draft_pass_is_not_the_verifiers(make_tiny):
    with pytest.raises(UserError, match="set branches to 0"):
        check_branches(make_tiny(lora={"rank_s": 2, "rank_d": 0}), 3)


def test_where_only_first_drafts_are_learned(model):
    """They would be recorded, and nothing learned from them. A block is learned whole, whatever is unrolled."""
    check_branches(model, 2)
    with pytest.raises(UserError, match=r"raise objective\.unroll_steps above 1, or set branches to 0$"):
        check_branches(model, 1)
    base = random_base(model.config, jax.random.key(0), jnp.float32)

    def medusa(heads):
        manifest = replace(model.manifest, drafter="medusa", drafter_config={"heads": heads})
        definition, params = split(build_model(model.config, manifest, base))
        return replace(model, definition=definition, params=params)

    check_branches(medusa(2), 1)
    with pytest.raises(UserError, match="this drafter makes one: set branches to 0"):
        check_branches(medusa(1), 3)
