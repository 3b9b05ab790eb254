"""Filling a tree: by passes of a step drafter, one a level, or from the block of a block drafter.

What is computed here decides what is proposed and nothing else. Letters as in `tree.py`; D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.decode.plan import Growth
from dvi_jax.decode.state import DecodeState
from dvi_jax.decode.step_drafting import first_row
from dvi_jax.decode.tree import Frontier, TokenTree, along_rows
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.drafters import BlockDrafter, StepDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama
from dvi_jax.model.tree_attention import Tree
from dvi_jax.model.tree_cache import TreeCache, branching, keep_path, later


class StepPasses:
    """The passes of a step drafter's round, while it is traced.

    The root goes through the caches like any committed token. The nodes behind it are kept beside the caches, in the
    draft pass's shallow layers and in whatever `LayerCache` the drafter has.
    """

    def __init__(self, model: SpeculativeLlama, drafter: StepDrafter, state: DecodeState, growth: Growth):
        self.model, self.drafter, self.state, self.growth = model, drafter, state, growth
        self.caches: tuple[TreeCache, ...] = ()  # of the draft pass, with the nodes behind the root
        self.drafter_state = state.drafter
        self.draft_hidden = state.committed.hidden[:, :1]  # [B, F, D]; of no use before the first pass
        self.passed = 0  # nodes behind the root that have been through the layers
        self.path: jax.Array  # int32 [B, F, levels - 1], the nodes behind the root on the way to each of the frontier

    def expand(self, level: int, frontier: Frontier) -> jax.Array:
        """Draft logits [B, F, Vd] behind the nodes of a level."""
        hidden = self._root() if level == 0 else self._nodes(level, frontier)
        with jax.named_scope("drafter"):
            self.draft_hidden = hidden
            return self.drafter.logits(hidden, self.model.draft_head())

    def _root(self) -> jax.Array:
        """The draft hidden state [B, 1, D] behind the pending token."""
        state = self.state
        hidden, caches = first_row(self.model, state)
        self.state = state.replace(trunk=caches) if self.model.separate_trunk else state.replace(shallow=caches)
        with jax.named_scope("drafter"):
            new, self.drafter_state = self.drafter.first(self.drafter_state, state.committed, hidden, state.length - 1)
        if self.growth.levels > 1:
            tree = self._tree(0, jnp.zeros((state.length.shape[0], 1, self.growth.levels - 1), jnp.int32))
            self.caches = branching(caches, tree)
            self.drafter_state = _map(LayerCache, lambda cache: TreeCache(cache, tree), self.drafter_state)
        return new

    def _nodes(self, level: int, frontier: Frontier) -> jax.Array:
        """The draft hidden states [B, F, D] behind nodes at `level` drafts behind the root."""
        state, first, beam = self.state, self.passed, frontier.node.shape[1]
        self.passed += beam
        own = first + jnp.arange(beam, dtype=jnp.int32)
        before = jnp.broadcast_to(own[:, None], (*frontier.node.shape, self.growth.levels - 1))
        if level > 1:
            behind = jnp.arange(self.growth.levels - 1) >= level - 1
            before = jnp.where(behind, before, along_rows(self.path, frontier.parent))
        self.path = before
        tree = self._tree(first, self.path)
        positions = jnp.broadcast_to((state.length - 1 + level)[:, None], frontier.node.shape)
        hidden, _, self.caches = self.model.llama.shallow(
            frontier.tokens[..., -1], later(self.caches, tree), positions, adapted=self.model.separate_trunk
        )
        with jax.named_scope("drafter"):
            of_tree = _map(TreeCache, lambda cache: cache.replace(tree=tree), self.drafter_state)
            context = along_rows(self.draft_hidden, frontier.parent)
            new, self.drafter_state = self.drafter.next(of_tree, context, hidden, positions)
        return new.astype(self.draft_hidden.dtype)

    def _tree(self, first: int, path: jax.Array) -> Tree:
        room = (self.growth.levels - 1) * self.growth.beam
        return Tree(path, self.state.length, first=first, room=room)

    def kept(self, tree: TokenTree, path: jax.Array) -> DecodeState:
        """The round's state with what was cached along the accepted `path` int32 [B, A] of rows.

        A path's last row may not have been drafted from; the next round begins with it.
        """
        nodes = jnp.maximum(along_rows(tree.source, path[:, 1:-1]) - 1, 0)

        def keep(cache: TreeCache) -> LayerCache:
            return keep_path([cache], nodes, self.state.length)[0]

        state = self.state.replace(drafter=_map(TreeCache, keep, self.drafter_state))
        if not (self.model.separate_trunk and self.caches):
            return state
        return state.replace(trunk=keep_path(self.caches, nodes, self.state.length))


class BlockPass:
    """The one pass of a block drafter, while it is traced."""

    def __init__(self, model: SpeculativeLlama, drafter: BlockDrafter, state: DecodeState, growth: Growth):
        self.model, self.drafter = model, drafter
        anchor, shallow = first_row(model, state)
        with jax.named_scope("drafter"):
            self.draft_hidden, own = drafter.propose(state.drafter, state.committed, anchor, growth.levels)
            self.logits = drafter.logits(self.draft_hidden, model.draft_head())  # [B, levels, Vd]
            self.state = state.replace(drafter=own, shallow=shallow)

    def expand(self, level: int, frontier: Frontier) -> jax.Array:
        """Draft logits [B, F, Vd] behind the nodes of a level."""
        logits, draft_hidden = (
            jnp.broadcast_to(x[:, level, None], (*frontier.node.shape, x.shape[-1]))
            for x in (self.logits, self.draft_hidden)
        )
        return self.drafter.corrected(logits, draft_hidden, frontier.tokens[..., -1], self.model.draft_ids())

    def kept(self, tree: TokenTree, path: jax.Array) -> DecodeState:
        """The round's state; nothing was cached along a path."""
        return self.state


def _map(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """A pytree with every cache of this kind changed."""
    return jax.tree.map(lambda x: change(x) if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind))
