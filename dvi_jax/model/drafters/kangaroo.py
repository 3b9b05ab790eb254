"""Kangaroo's adapter, with upstream's weights and semantics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.config import LlamaConfig
from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.drafters.base import Committed, Drafter
from dvi_jax.model.layers import linear, rms_norm
from dvi_jax.model.variables import DrafterParam


class Kangaroo(Drafter):
    """Kangaroo's adapter: one attention-only layer (no MLP) with its own KV cache, a final norm, the base LM head.

    Rotary base 10000 always and head size D/N, as upstream has them (arXiv 2404.18911).
    """

    kind = "kangaroo"

    def __init__(
        self,
        config: LlamaConfig,
        *,
        key: jax.Array,
        norm: jax.Array,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        rms_norm_eps: float | None = None,
    ):
        """Heads and epsilon default to the base model's; `norm` starts the final norm."""
        self.num_heads = num_heads or config.num_heads
        self.num_kv_heads = num_kv_heads or num_heads or config.num_heads
        self.eps = rms_norm_eps or config.rms_norm_eps
        width = config.hidden_size
        self.head_dim = width // self.num_heads
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv_key, out_key = jax.random.split(key)
        self.attn_norm = DrafterParam(jnp.ones(width, jnp.float32))
        self.qkv = DrafterParam(jax.random.normal(qkv_key, (query + 2 * kv, width), jnp.float32) * 0.02)
        self.out = DrafterParam(jax.random.normal(out_key, (width, query), jnp.float32) * 0.02)
        self.norm = DrafterParam(jnp.asarray(norm, jnp.float32))

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
        shape = (batch, self.num_kv_heads, slots, self.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def prefill(self, state: LayerCache, hidden: jax.Array, feature: jax.Array, positions: jax.Array) -> LayerCache:
        _, key, value = self._heads(hidden, positions)
        return attention.write_rows(state, key, value, positions[:, 0])

    def first(
        self, state: LayerCache, previous: Committed, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        # The last committed row drafted nothing if it ended its round, so the cache may lack it; run again, it gives
        # the same keys.
        last = jnp.take_along_axis(previous.hidden, (previous.count - 1)[:, None, None], axis=1)
        rows = jnp.concatenate([last, hidden], axis=1)
        draft, state = self._run(state, rows, (position - 1)[:, None] + jnp.arange(2))
        return draft[:, 1:], state

    def next(
        self, state: LayerCache, feature: jax.Array, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return self._run(state, hidden, position[:, None])

    def unroll(self, hidden: jax.Array, feature: jax.Array, positions: jax.Array, steps: int) -> list[jax.Array]:
        mask = positions[:, None, :] <= positions[:, :, None]
        return [self._attend(hidden, *self._heads(hidden, positions), mask)]

    def config(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "rms_norm_eps": self.eps}

    def _run(self, cache: LayerCache, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, LayerCache]:
        query, key, value = self._heads(hidden, positions)
        cache = attention.write_rows(cache, key, value, positions[:, 0])
        mask = attention.cached_mask(positions, cache.key.shape[2])
        return self._attend(hidden, query, *cache, mask), cache

    def _heads(self, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        normed = rms_norm(hidden, self.attn_norm[...], self.eps)
        rope = attention.rope_tables(attention.rope_frequencies(self.head_dim, 10000.0, None), positions)
        qkv = linear(normed, self.qkv[...].astype(hidden.dtype))
        return attention.split_heads(qkv, (self.num_heads, self.num_kv_heads, self.head_dim), rope)

    def _attend(
        self, hidden: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> jax.Array:
        mixed = linear(attention.attend(query, key, value, mask), self.out[...].astype(hidden.dtype))
        return rms_norm(hidden + mixed, self.norm[...], self.eps)
