"""The KV caches of layers while a token tree goes through them: committed slots, and the nodes beside them.

Where the GPU's kernel runs, all rows of a pass are one call (`tree_attention.py`). Elsewhere each row's path is laid
behind the committed slots in turn, and attention is the einsum of a round of as many rows: that row's bits are those it
has there. Letters as in `tree_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from dvi_jax.model import attention, decode_attention, tree_attention
from dvi_jax.model.attention import Caches, Heads, LayerCache, Rope
from dvi_jax.model.products import total
from dvi_jax.model.tree_attention import Tree


class TreeCache(struct.PyTreeNode):
    """One layer's cache in place of a `LayerCache`: what goes through the layer are nodes of `tree`."""

    committed: LayerCache  # read, not written
    tree: Tree
    nodes: LayerCache | None = None  # [B, K, M, H] each, of the nodes of earlier passes

    def attend(
        self, qkv: jax.Array, heads: Heads, rope: Rope, positions: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, TreeCache]:
        """`attention.attend_cached`, each row over the committed slots before the root and its own path."""
        if not decode_attention.is_supported(positions.shape[1], heads[2], self.committed.key.dtype):
            return self._attend_by_rows(qkv, heads, rope, positions, bias)
        flat = attention.flat_by_head(qkv, heads)
        biases = () if bias is None else (attention.by_head(bias, heads),)
        mixed, key, value = tree_attention.tree_attention(
            flat, rope, *self.committed, positions, self.tree, self.nodes, *biases
        )
        return mixed.reshape(*qkv.shape[1:-1], -1), self.replace(nodes=LayerCache(key, value))

    def _attend_by_rows(
        self, qkv: jax.Array, heads: Heads, rope: Rope, positions: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, TreeCache]:
        query, key, value = attention.split_heads(total(qkv, self.committed.key.dtype, bias), heads, rope)
        batch, size = positions.shape[0], heads[2]
        nodes = self.nodes or _room(self.committed, self.tree.room)
        first = jnp.full((batch,), self.tree.first)
        nodes = attention.write_rows(nodes, key, value, first)
        mask = attention.cached_mask(positions, self.committed.key.shape[2])

        def one(row: jax.Array, mixed: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_index_in_dim(self.tree.path, row, axis=1, keepdims=False)
            cache = _laid(self.committed, nodes, own, self.tree.start)
            rows = jax.lax.dynamic_slice_in_dim(attention.attend(query, *cache, mask), row, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(mixed, rows, row, axis=1)

        empty = jnp.zeros((*positions.shape, heads[0] * size), query.dtype)
        return jax.lax.fori_loop(0, positions.shape[1], one, empty), self.replace(nodes=nodes)


def branching(caches: Caches, tree: Tree) -> tuple[TreeCache, ...]:
    """The caches for a first pass of a tree's nodes."""
    return tuple(TreeCache(cache, tree) for cache in caches)


def later(caches: Sequence[TreeCache], tree: Tree) -> tuple[TreeCache, ...]:
    """The caches for the next pass, whose rows stand as `tree` says."""
    return tuple(cache.replace(tree=tree) for cache in caches)


def keep_path(caches: Sequence[TreeCache], path: jax.Array, start: jax.Array) -> Caches:
    """The committed caches with the nodes of `path` int32 [B, A] in slots start[b] .. start[b] + A - 1."""
    pairs = [(cache.committed, cache.nodes) for cache in caches if cache.nodes is not None]
    if pairs and decode_attention.is_supported(1, pairs[0][0].key.shape[-1], pairs[0][0].key.dtype):
        committed, nodes = zip(*pairs, strict=True)
        return tuple(LayerCache(*kept) for kept in tree_attention.keep_path(committed, nodes, path, start))
    return tuple(_laid(committed, nodes, path, start) for committed, nodes in pairs)


def _laid(committed: LayerCache, nodes: LayerCache, path: jax.Array, start: jax.Array) -> LayerCache:
    """The cache with the nodes of `path` [B, A] from slot `start` [B] on."""
    rows = jax.tree.map(lambda x: jnp.take_along_axis(x, path[:, None, :, None], axis=2), nodes)
    return attention.put_rows(committed, rows, start)


def _room(cache: LayerCache, room: int) -> LayerCache:
    """Zeros for so many nodes, kept as `cache` keeps its rows."""
    return jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], room, x.shape[3]), x.dtype), cache)
