"""One round of a tree plan: a tree is proposed, all its nodes are verified in one pass, a right path is committed.

A right path is a chain, so accepting and committing are those of any round (`commit.py`). Letters: B batch, R rows of
the tree, A nodes of its longest path, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.decode import vocabulary
from dvi_jax.decode.branches import of_tree
from dvi_jax.decode.commit import Verdict, accept, commit, record
from dvi_jax.decode.plan import Plan, rows_alike
from dvi_jax.decode.sampling import draw_coupled, reject, verifier_log_probs
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs
from dvi_jax.decode.tree import TokenTree, along_rows, grow
from dvi_jax.decode.tree_drafting import BlockPass, StepPasses
from dvi_jax.model.drafters import BlockDrafter, StepDrafter
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import SpeculativeLlama
from dvi_jax.model.tree_attention import Tree
from dvi_jax.model.tree_cache import TreeCache, branching, keep_path


def tree_round(model: SpeculativeLlama, state: DecodeState, knobs: Knobs, plan: Plan) -> DecodeState:
    """One round: a tree of `plan.rows` rows, of which a path is committed."""
    # Propose. Row 0 is the pending token, the root of the tree.
    tree, passes = propose_tree(model, state, knobs, plan)
    # Verify. All nodes at once: which token would the model itself put after each of them?
    rows = verify_tree(model, passes.state, tree)
    # Accept. The longest path on which every draft is the verifier's token.
    path = right_path(tree, rows.verified)  # [B, A]
    verified, tokens, depth = (along_rows(x, path) for x in (rows.verified, tree.tokens, tree.depth))
    drafts = depth[:, -1]
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    verdict = accept(verified, following, drafts, knobs.eos_ids)
    # Commit. The path goes into the caches; it is then what the rows of a chain would be.
    hidden = along_rows(rows.hidden, path)
    features: Features = jax.tree.map(lambda x: along_rows(x, path), rows.features)
    below = len(state.shallow)
    caches = keep_path(rows.caches, path, state.length - 1)
    kept = passes.kept(tree, path).replace(shallow=caches[:below], deep=caches[below:])
    signals = state.signals
    if signals is not None:
        first = along_rows(tree.children(1)[..., 0], path)
        most = signals.most_branches
        branches = of_tree(tree, path, verdict, rows.hidden, rows.features.final, most) if most else None
        signals = record(signals, state, first, features, _of_first_children(verdict, first, verified), branches)
    return commit(kept, tree.reached, verified, hidden, features, verdict, signals)


def propose_tree(
    model: SpeculativeLlama, state: DecodeState, knobs: Knobs, plan: Plan
) -> tuple[TokenTree, StepPasses | BlockPass]:
    """The round's tree, and the passes that filled it."""
    batch, width = state.committed.hidden.shape[:2]
    drafter = model.drafter
    levels = min(plan.drafts, width - 1, drafter.max_drafts or plan.drafts)
    growth = plan.growth._replace(levels=levels)
    passes: StepPasses | BlockPass
    if isinstance(drafter, BlockDrafter):
        passes = BlockPass(model, drafter, state, growth)
    else:
        assert isinstance(drafter, StepDrafter)
        passes = StepPasses(model, drafter, state, growth)
    tree = grow(model, state, knobs, plan.rows, growth, passes.expand)
    alike = rows_alike(batch * plan.rows, model.llama.config, model.llama.dtype)
    return (tree if alike else tree.widened(width)), passes


class Rows(NamedTuple):
    """What the verifier made of a tree's rows."""

    verified: jax.Array  # int32 [B, R], its token after each
    hidden: jax.Array  # [B, R, D], exit hidden states
    features: Features  # [B, R, ...]
    caches: tuple[TreeCache, ...]  # of all layers


def verify_tree(model: SpeculativeLlama, state: DecodeState, tree: TokenTree) -> Rows:
    """All nodes through all layers, each behind its own ancestors; the caches of `state` are read only."""
    llama = model.llama
    where = Tree(tree.path, state.length - 1, room=tree.tokens.shape[1])
    positions = (state.length - 1)[:, None] + tree.depth
    tokens = jnp.maximum(tree.tokens, 0)  # rows without a draft hold NO_TOKEN
    rows = llama.verify(tokens, branching(state.shallow, where), branching(state.deep, where), positions)
    if state.sampling is None:
        verified = vocabulary.best_of_round(rows.logits, llama.shards)
    else:
        logits, before = llama.all_logits(rows.logits), tree.tokens_before()
        if tree.log_q is None:
            verified = draw_coupled(logits, state.sampling, before, positions + 1)
        else:
            log_p = verifier_log_probs(logits, state.sampling, before)
            verified = reject(log_p, tree.log_q, tree.children(tree.most_children), state.sampling, positions + 1)
    return Rows(verified, rows.hidden, Features.of(rows.final, rows.tapped), (*rows.shallow, *rows.deep))


def right_path(tree: TokenTree, verified: jax.Array) -> jax.Array:
    """int32 [B, A]: the rows of the longest path on which each draft is the verifier's token after the row before."""
    right = tree.tokens == along_rows(verified, tree.parent)  # NO_TOKEN is no token of the verifier's
    # Worths that are no numbers rank nodes in no order, and one may then be told another parent than its own.
    right &= tree.depth == along_rows(tree.depth, tree.parent) + 1
    right = right.at[:, 0].set(True)
    on_path = jnp.all(along_rows(right, tree.path), axis=2)
    end = jnp.argmax(jnp.where(on_path, tree.depth, -1), axis=1)
    return jnp.take_along_axis(tree.path, end[:, None, None], axis=1)[:, 0]


def _of_first_children(verdict: Verdict, first: jax.Array, verified: jax.Array) -> Verdict:
    """The verdict on the drafter's first choice behind each row of the path, int32 [B, A]: what a chain would judge."""
    judged = (first >= 0) & (jnp.arange(first.shape[1]) < verdict.accept_length[:, None])
    return verdict._replace(judged=judged, correct=first == verified)
