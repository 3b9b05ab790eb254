"""Drafts that were verified and not taken: rows one token off the committed text.

The verifying pass computed them anyway, so it is known which tokens would have followed. In a chain that is the first
draft that was rejected; in a tree every child of the accepted path that is not on it. What lies behind them is two
tokens off and more, and is left out: the drafter would need the states of a whole path for it.

Letters: B batch, S positions, K rows of a position at most, W rows of a round, A nodes of a tree's longest path, D
hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.decode.selection import top

if TYPE_CHECKING:
    from dvi_jax.decode.commit import Verdict
    from dvi_jax.decode.plan import Plan
    from dvi_jax.decode.tree import TokenTree

NO_BRANCH = -1  # the token where there is none


class Branches(struct.PyTreeNode):
    """Such rows, at most K of a position, indexed by the position that they predict: one behind their own."""

    tokens: jax.Array  # int32 [B, S, K], the draft; NO_BRANCH where there is none
    hidden: jax.Array  # [B, S, K, D], its exit hidden state, with base weights
    final: jax.Array  # [B, S, K, D], the verifier's final hidden state behind it

    @classmethod
    def empty(cls, batch: int, slots: int, most: int, width: int, dtype: jnp.dtype) -> Branches:
        """None anywhere, with room for `most` at each position."""
        states = jnp.zeros((batch, slots, most, width), dtype)
        return cls(jnp.full((batch, slots, most), NO_BRANCH, jnp.int32), states, states)


def of_chain(verdict: Verdict, following: jax.Array, hidden: jax.Array, final: jax.Array, most: int) -> Branches:
    """[B, W, K]: the round's first reject, where row i's draft, `following` int32 [B, W], stands in row i + 1.

    hidden, final: [B, W, D], of the round's rows.
    """
    is_reject = verdict.judged & ~verdict.correct

    def behind(rows: jax.Array) -> jax.Array:
        spread = jnp.roll(rows, -1, axis=1)[:, :, None]
        return jnp.pad(spread, ((0, 0), (0, 0), (0, most - 1), (0, 0)))

    tokens = jnp.where(is_reject, following, NO_BRANCH)[..., None]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, most - 1)), constant_values=NO_BRANCH)
    return Branches(tokens, behind(hidden), behind(final))


def of_tree(
    tree: TokenTree, path: jax.Array, verdict: Verdict, hidden: jax.Array, final: jax.Array, most: int
) -> Branches:
    """[B, A, K]: the best children of the accepted `path` int32 [B, A] that are not on it; states of rows [B, R, D]."""
    nodes = jnp.arange(path.shape[1])
    on_path = nodes < verdict.accept_length[:, None]  # [B, A]
    taken = jnp.where(jnp.pad(on_path[:, 1:], ((0, 0), (0, 1))), jnp.roll(path, -1, axis=1), -1)  # the right child
    rows = jnp.arange(tree.tokens.shape[1])
    child = tree.is_draft[:, None] & (tree.parent[:, None] == path[..., None])  # [B, A, R]
    child &= on_path[..., None] & (rows != taken[..., None])
    score, chosen = top(jnp.where(child, -tree.place[:, None].astype(jnp.float32), -jnp.inf), most)  # [B, A, K]

    def of_rows(values: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, at: row[at])(values, chosen)

    tokens = jnp.where(score > -jnp.inf, of_rows(tree.tokens), NO_BRANCH)
    return Branches(tokens, of_rows(hidden), of_rows(final))


def most_branches(plan: Plan) -> int:
    """K: the rows of a position that are kept of such rounds."""
    return 2 if plan.kind == "tree" else 1
