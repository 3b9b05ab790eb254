"""Kangaroo's adapter, with upstream's weights and semantics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.drafters.base import BranchRows, Committed, Origin, StepDrafter
from dvi_jax.model.drafters.unrolled import attend_text
from dvi_jax.model.features import Features
from dvi_jax.model.products import linear
from dvi_jax.model.residual import rms_norm
from dvi_jax.model.variables import DrafterParam
from dvi_jax.settings import require


@dataclass(frozen=True)
class KangarooOptions:
    """What upstream's adapter config says; the base model's values where it says nothing."""

    num_heads: int | None = None  # query heads
    num_kv_heads: int | None = None  # as many as query heads unless given
    rms_norm_eps: float | None = None


class Kangaroo(StepDrafter):
    """Kangaroo's adapter: one attention-only layer (no MLP) with its own KV cache, a final norm, the base LM head.

    Rotary base 10000 always and head size D/N, as upstream has them (arXiv 2404.18911).
    """

    kind = "kangaroo"
    needs_exit_layer = True
    Options = KangarooOptions

    def __init__(self, origin: Origin, options: KangarooOptions):
        config = origin.config
        self.num_heads = options.num_heads or config.num_heads
        self.num_kv_heads = options.num_kv_heads or options.num_heads or config.num_heads
        self.eps = options.rms_norm_eps or config.rms_norm_eps
        self.options = replace(options, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, rms_norm_eps=self.eps)
        width = config.hidden_size
        heads = f"a divisor of hidden_size={width} that leaves heads of even size (rotary embeddings turn pairs)"
        self.head_dim = width // max(self.num_heads, 1)
        fits = self.head_dim * self.num_heads == width and self.head_dim % 2 == 0
        require(fits, "num_heads", self.num_heads, heads)
        divides = self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0
        require(divides, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}")
        require(0 < self.eps < 1, "rms_norm_eps", self.eps, "above 0 and below 1")
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv_key, out_key = jax.random.split(origin.key)
        self.attn_norm = DrafterParam(jnp.ones(width, jnp.float32))
        self.qkv = DrafterParam(jax.random.normal(qkv_key, (query + 2 * kv, width), jnp.float32) * 0.02)
        self.out = DrafterParam(jax.random.normal(out_key, (width, query), jnp.float32) * 0.02)
        self.norm = DrafterParam(jnp.asarray(origin.norm, jnp.float32))

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
        shape = (batch, self.num_kv_heads, slots, self.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def prefill(self, state: LayerCache, hidden: jax.Array, before: Features, positions: jax.Array) -> LayerCache:
        _, key, value = attention.split_heads(*self._qkv(hidden, positions))
        return attention.write_rows(state, key, value, positions[:, 0])

    def first(
        self, state: LayerCache, committed: Committed, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        # The last committed row drafted nothing if it ended its round, so the cache may lack it; run again, it gives
        # the same keys.
        last = jnp.take_along_axis(committed.hidden, (committed.count - 1)[:, None, None], axis=1)
        rows = jnp.concatenate([last, hidden], axis=1)
        draft, state = self._run(state, rows, (position - 1)[:, None] + jnp.arange(2))
        return draft[:, 1:], state

    def next(
        self, state: LayerCache, draft_hidden: jax.Array, hidden: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return self._run(state, hidden, positions)

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        qkv, heads, rope = self._qkv(hidden, positions)
        mixed, _ = attention.attend_fresh(qkv[None], heads, rope, None, positions)
        return [self._finish(hidden, mixed)]

    def unroll_branches(
        self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int, branches: BranchRows
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        _, key, value = attention.split_heads(*self._qkv(hidden, positions))
        query, *own = attention.split_heads(*self._qkv(branches.hidden, branches.positions))
        seen = positions[:, None] < branches.positions[..., None]
        mixed = attend_text(query, key, value, seen, [(own[0], own[1])])
        return self.unroll(hidden, features, positions, steps), [self._finish(branches.hidden, mixed)]

    def _run(self, cache: LayerCache, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, LayerCache]:
        qkv, heads, rope = self._qkv(hidden, positions)
        mixed, cache = attention.attend_cached(qkv[None], heads, rope, cache, positions)
        return self._finish(hidden, mixed), cache

    def _qkv(self, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, attention.Heads, attention.Rope]:
        """Fused queries, keys and values of hidden [B, T, D], how to split them, and how to turn them."""
        normed = rms_norm(hidden, self.attn_norm[...], self.eps)
        qkv = linear(normed, self.qkv[...].astype(hidden.dtype))
        frequencies = attention.rope_frequencies(self.head_dim, 10000.0, None)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        return qkv, heads, attention.rope_tables(frequencies, positions)

    def _finish(self, hidden: jax.Array, mixed: jax.Array) -> jax.Array:
        """After attention: residual stream [B, T, D] and [B, T, N*H] -> draft hidden [B, T, D]."""
        out = linear(mixed, self.out[...].astype(hidden.dtype))
        return rms_norm(hidden + out, self.norm[...], self.eps)
