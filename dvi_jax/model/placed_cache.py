"""The KV cache of a layer of which one sequence goes through the layer, where it lies among others.

An engine takes a prompt in where it is to stay, so that nothing has to be copied into a slot. Letters as in
`attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
from flax import struct

from dvi_jax.model import attention, decode_attention, prefill_attention
from dvi_jax.model.attention import Caches, Heads, LayerCache, Rope
from dvi_jax.model.kept_kv import keep
from dvi_jax.model.products import has_gpu_kernels, total


class PlacedCache(struct.PyTreeNode):
    """One layer's cache in place of a `LayerCache` of batch 1, for the sequence at `place`."""

    cache: LayerCache  # of all sequences
    place: jax.Array  # int32 [1]

    def attend(
        self, qkv: jax.Array, heads: Heads, rope: Rope, positions: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, PlacedCache]:
        """`attention.attend_cached` of that sequence: B is 1. The others' rows stay as they are."""
        dtype = self.cache.key.dtype
        if decode_attention.is_supported(positions.shape[1], heads[2], dtype):
            flat = attention.flat_by_head(qkv, heads)
            biases = None if bias is None else attention.by_head(bias, heads)
            mixed, *kept = decode_attention.cached_attention(flat, rope, *self.cache, positions, biases, self.place)
            return mixed.reshape(*qkv.shape[1:-1], -1), self.replace(cache=LayerCache(*kept))
        query, key, value = attention.split_heads(total(qkv, dtype, bias), heads, rope)
        rows = LayerCache(keep(key, self.cache.key), keep(value, self.cache.value))
        start = self.place[0], 0, positions[0, 0], 0
        cache = jax.tree.map(partial(jax.lax.dynamic_update_slice, start_indices=start), self.cache, rows)
        return self._over(cache, query, positions), self.replace(cache=cache)

    def _over(self, cache: LayerCache, query: jax.Array, positions: jax.Array) -> jax.Array:
        """Attention of turned queries [1, T, N, H] over the sequence's rows, which are in the cache."""
        if has_gpu_kernels(query.dtype) and decode_attention.fits(query.shape[-1]):
            return prefill_attention.prefill_attention(query, *cache, positions, self.place)
        own = LayerCache(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, self.place[0], 1), cache))
        return attention.attend_over(query, own, positions)


def placed(caches: Caches, place: jax.Array) -> tuple[PlacedCache, ...]:
    """The caches of all layers, for the sequence at int32 `place` [1]."""
    return tuple(PlacedCache(cache, place) for cache in caches)


def all_of(caches: Sequence[PlacedCache]) -> Caches:
    """The caches with all their sequences."""
    return tuple(cache.cache for cache in caches)
