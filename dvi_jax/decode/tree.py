"""Token trees: the best set of continuations that a drafter sees, grown level by level.

Each level drafts from the `beam` best nodes of the level before, `children` tokens from each; of all that were seen,
the best become rows (EAGLE-2's rule, arXiv 2406.16858): a node is worth the probability, by the drafter, that it and
all its ancestors are right. A node is never worth more than its parent, so the best form a tree.

With coupled sampling a token is chosen by its log probability plus the noise of its position, and that sum is what
drafts are ranked by. With rejection sampling, children are drawn from q, none twice. Whether a child gets a row must
then not depend on which token it is, so it is worth what its place among its siblings usually is.

Letters: B batch, R rows of the tree, F nodes that a level drafts from, C children of each, V vocabulary, Vd tokens that
may be drafted, A nodes of the longest path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dvi_jax.decode.drafting import Bounds, bounds_of, pending_token
from dvi_jax.decode.plan import Growth
from dvi_jax.decode.sampling import Purpose, gumbel, verifier_log_probs
from dvi_jax.decode.selection import at_places, ranks, top
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs
from dvi_jax.decode.vocabulary import best_few
from dvi_jax.model.speculative_llama import SpeculativeLlama

# Share of drafts that are right, by place among their siblings (SmolLM2-135M with its kept drafter, chat).
USUALLY_RIGHT = (0.55, 0.13, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)


class TokenTree(struct.PyTreeNode):
    """A round's proposals. Row 0 is the pending token, the root; a row comes after its parent."""

    tokens: jax.Array  # int32 [B, R], NO_TOKEN where there is no node
    parent: jax.Array  # int32 [B, R], a row; 0 for the root
    depth: jax.Array  # int32 [B, R], drafts up to and with this one
    place: jax.Array  # int32 [B, R], among its siblings, the best first
    path: jax.Array  # int32 [B, R, A], rows from the root on and itself, which also fills the rest
    source: jax.Array  # int32 [B, R], number among the nodes that were drafted from, root 0; -1 for the others
    log_q: jax.Array | None = None  # float32 [B, R, V], what its children were drawn from; for rejection sampling alone
    most_children: int = struct.field(pytree_node=False, default=1)  # of a row

    @property
    def is_draft(self) -> jax.Array:
        """bool [B, R]: the row holds a draft."""
        return (self.depth > 0) & (self.tokens >= 0)

    @property
    def reached(self) -> jax.Array:
        """int32 [B]: drafts of the longest path."""
        return jnp.max(jnp.where(self.is_draft, self.depth, 0), axis=1)

    def tokens_before(self) -> jax.Array:
        """int32 [B, R, A]: the tokens from the root up to and with each row, NO_TOKEN behind them."""
        along = along_rows(self.tokens, self.path)
        return jnp.where(jnp.arange(self.path.shape[2]) <= self.depth[..., None], along, NO_TOKEN)

    def children(self, most: int) -> jax.Array:
        """int32 [B, R, C]: the tokens of each row's first `most` children by place, NO_TOKEN where there are fewer."""
        parent, place, tokens = (x[:, None, :, None] for x in (self.parent, self.place, self.tokens))
        rows = jnp.arange(self.tokens.shape[1])[:, None, None]
        child = self.is_draft[:, None, :, None] & (parent == rows) & (place == jnp.arange(most))  # [B, R, R, C]
        return jnp.max(jnp.where(child, tokens, NO_TOKEN), axis=2)

    def widened(self, width: int) -> TokenTree:
        """The same with `width` rows, those behind without a draft."""
        more = width - self.tokens.shape[1]

        def pad(rows: jax.Array, value: int) -> jax.Array:
            return jnp.pad(rows, ((0, 0), (0, more), *[(0, 0)] * (rows.ndim - 2)), constant_values=value)

        return TokenTree(
            tokens=pad(self.tokens, NO_TOKEN),
            parent=pad(self.parent, 0),
            depth=pad(self.depth, 1),
            place=pad(self.place, 0),
            path=pad(self.path, 0),
            source=pad(self.source, -1),
            log_q=None if self.log_q is None else pad(self.log_q, 0),
            most_children=self.most_children,
        )


class Frontier(NamedTuple):
    """The nodes that a level drafts from."""

    node: jax.Array  # int32 [B, F], its number among all that were seen; the root is 0
    parent: jax.Array  # int32 [B, F], which of the frontier before it comes from
    tokens: jax.Array  # int32 [B, F, level + 1], the tokens of its path, the root's first
    worth: jax.Array  # float32 [B, F], log probability that all up to here is right
    goes_on: jax.Array  # bool [B, F], it may have children


class _Seen(NamedTuple):
    """The nodes that a level has found, [B, F * C]."""

    tokens: jax.Array  # int32
    worth: jax.Array  # float32, -inf where there is none
    parent: jax.Array  # int32, its parent's number
    place: jax.Array  # int32, among its siblings
    source: jax.Array  # int32, as in `TokenTree`


Expand = Callable[[int, Frontier], jax.Array]  # draft logits [B, F, Vd] behind the nodes of a level, from 0


def grow(
    model: SpeculativeLlama, state: DecodeState, knobs: Knobs, rows: int, growth: Growth, expand: Expand
) -> TokenTree:
    """A tree of so many rows. `knobs` bound it as they bound a chain.

    No path is longer than `draft_steps` or than what the sequence may still get, and a draft less probable than the
    threshold, or whose reach does not pay, has no children.
    """
    bounds = bounds_of(state, knobs, growth.levels + 1)
    root = pending_token(state)
    zero = jnp.zeros_like(root)
    frontier = Frontier(zero, zero, root[..., None], jnp.zeros(root.shape, jnp.float32), bounds.most[:, None] > 0)
    seen: list[_Seen] = []
    log_qs: list[jax.Array] = []
    sources = 0  # nodes that were drafted from
    for level in range(growth.levels):
        logits = expand(level, frontier)
        sources += frontier.node.shape[1]
        children = min(growth.children if level else growth.beam, logits.shape[-1])
        drawn = _draw(model, state, frontier, level, logits, children)
        first = 1 + sum(each.tokens.shape[1] for each in seen)
        beam = min(growth.beam, drawn.tokens[0].size) if level + 1 < growth.levels else 0
        found, frontier = _level(bounds, knobs, frontier, level, drawn, beam, first, sources)
        seen.append(found)
        log_qs += [] if drawn.log_q is None else [drawn.log_q]
    depth = np.repeat(np.arange(growth.levels) + 1, [each.tokens.shape[1] for each in seen])
    most_children = max(growth.beam, growth.children)
    nodes = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *seen)
    tree = _best(root, nodes, depth, min(rows, 1 + len(depth)))  # few levels may have fewer nodes than there are rows
    tree = tree.replace(most_children=most_children)
    if log_qs:
        source = jnp.maximum(tree.source, 0)[..., None]
        tree = tree.replace(log_q=jnp.take_along_axis(jnp.concatenate(log_qs, axis=1), source, axis=1))
    return tree.widened(rows)


def along_rows(rows: jax.Array, path: jax.Array) -> jax.Array:
    """What rows [B, R, ...] hold along `path` int32 [B, ..., A]."""
    return jax.vmap(lambda r, p: r[p])(rows, path)


class _Drawn(NamedTuple):
    """The children of the nodes of a level, the best first, [B, F, C]."""

    tokens: jax.Array  # int32
    worth: jax.Array  # float32, log probability that it is right if its parent is; -inf where there is none
    confidence: jax.Array  # float32, the drafter's log probability of the token
    log_q: jax.Array | None  # float32 [B, F, V], what they were drawn from; for rejection sampling alone


def _draw(
    model: SpeculativeLlama, state: DecodeState, frontier: Frontier, level: int, logits: jax.Array, children: int
) -> _Drawn:
    """The best children of each node of the frontier by draft logits [B, F, Vd]."""
    sampling = state.sampling
    if sampling is None:
        best, index, total = best_few(model.calibrated(logits, level), children, model.draft_shards)
        worth = best - total
        return _Drawn(model.draft_token(index), worth, worth, None)
    log_q = verifier_log_probs(model.over_vocabulary(logits), sampling, frontier.tokens)
    position = jnp.broadcast_to(state.length[:, None] + level, frontier.node.shape)
    # With rejection each node's noise is its own. A node of this number at this position exists in one round only:
    # where a position is drafted again, fewer drafts lie before it.
    purpose = Purpose.TOKEN if sampling.coupled else Purpose.DRAFT + len(Purpose) * (1 + frontier.node)
    scores = log_q + gumbel(sampling, position, log_q.shape[-1], purpose)
    best, tokens = top(scores, children)
    confidence = jnp.take_along_axis(log_q, tokens, axis=-1)
    if sampling.coupled:
        worth = best - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        return _Drawn(tokens, worth, confidence, None)
    usual = jnp.log(jnp.array(USUALLY_RIGHT[:children], jnp.float32))
    return _Drawn(tokens, jnp.where(best > -jnp.inf, usual, -jnp.inf), confidence, log_q)


def _level(
    bounds: Bounds, knobs: Knobs, frontier: Frontier, level: int, drawn: _Drawn, beam: int, first: int, sources: int
) -> tuple[_Seen, Frontier]:
    """The nodes that a level has found, numbered from `first` on, and the best of them, which the next drafts from.

    `sources`: how many nodes were drafted from before.
    """
    batch, nodes, children = drawn.tokens.shape

    def flat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, drawn.tokens.shape).reshape(batch, nodes * children)

    worth = jnp.where(frontier.goes_on[..., None], frontier.worth[..., None] + drawn.worth, -jnp.inf)
    tokens, worth, confidence = flat(drawn.tokens), flat(worth), flat(drawn.confidence)
    place = flat(jnp.arange(children, dtype=jnp.int32))
    in_order = nodes == 1  # as siblings come
    places = place if in_order else ranks(worth)
    chosen = place[:, :beam] if in_order else at_places(places, beam)
    best, parent = along_rows(worth, chosen), chosen // children
    path = jnp.concatenate([along_rows(frontier.tokens, parent), along_rows(tokens, chosen)[..., None]], axis=-1)
    is_sure = jnp.exp(along_rows(confidence, chosen)) >= knobs.threshold
    pays = jnp.exp(best) >= bounds.least_reach[:, None]
    goes_on = (best > -jnp.inf) & is_sure & pays & (level + 1 < bounds.most[:, None])
    source = jnp.where(places < beam, sources + places, -1)
    found = _Seen(tokens, worth, flat(frontier.node[..., None]), place, source)
    return found, Frontier(first + chosen, parent, path, best, goes_on)


def _best(root: jax.Array, seen: _Seen, depth: np.ndarray, rows: int) -> TokenTree:
    """The tree of the root, int32 [B, 1], and the best nodes [B, N], whose depths are `depth` [N]."""
    is_chosen = ranks(seen.worth) < rows - 1  # of equals the first: a parent before its children
    order = jnp.where(is_chosen, jnp.cumsum(is_chosen, axis=1) - 1, -1)
    chosen = at_places(order, rows - 1)
    picked = _Seen(*(along_rows(x, chosen) for x in seen))
    real = picked.worth > -jnp.inf

    def with_root(first: jax.Array | int, rest: jax.Array, otherwise: int) -> jax.Array:
        first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), root.shape)
        return jnp.concatenate([first, jnp.where(real, rest, otherwise)], axis=1)

    is_parent = picked.parent[:, :, None] == chosen[:, None, :] + 1  # the root has no column: its children get row 0
    parent = with_root(0, jnp.sum(is_parent * jnp.arange(1, rows), axis=2, dtype=jnp.int32), 0)
    depths = with_root(0, jnp.asarray(depth, jnp.int32)[chosen], 1)
    ancestors = [jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), parent.shape)]
    for _ in range(int(depth[-1])):
        ancestors.append(along_rows(parent, ancestors[-1]))
    up = jnp.maximum(depths[..., None] - jnp.arange(len(ancestors)), 0)
    return TokenTree(
        tokens=with_root(root, picked.tokens, NO_TOKEN),
        parent=parent,
        depth=depths,
        place=with_root(0, picked.place, 0),
        path=jnp.take_along_axis(jnp.stack(ancestors, axis=-1), up, axis=-1),
        source=with_root(0, picked.source, -1),
    )
