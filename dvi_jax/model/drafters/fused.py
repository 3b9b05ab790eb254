"""A decoder layer on the exit hidden state fused with the verifier's feature of the previous position.

The verifier's final hidden state f(t-1) is always known for the first draft of a round: the verifier chose the current
token there. Later drafts use the layer's own output in its place. After a round, the cache rows of the committed
positions are computed again with verifier features, in the pass of the next round's first draft, so the context always
looks as it did in training. (EAGLE, arXiv 2401.15077; training on the mix of both kinds of feature: EAGLE-3,
arXiv 2503.01840.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.decode_products import round_linear
from dvi_jax.model.drafters.base import Committed, NoOptions, Origin, StepDrafter
from dvi_jax.model.features import Features
from dvi_jax.model.products import linear
from dvi_jax.model.residual import rms_norm
from dvi_jax.model.variables import DrafterParam

Product = Callable[[jax.Array, jax.Array], jax.Array]  # `linear`, or in a round `round_linear`, which has no derivative


class Fused(StepDrafter):
    """Attention and MLP on a projection of [h_k(t), f(t-1)]; heads and rotary base are the base model's."""

    kind = "fused"

    def __init__(self, origin: Origin, options: NoOptions):
        config = origin.config
        self.options = options
        self.architecture = config
        d, f = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        keys = iter(jax.random.split(origin.key, 5))

        def matrix(*shape: int) -> DrafterParam:
            return DrafterParam(shape[1] ** -0.5 * jax.random.normal(next(keys), shape, jnp.float32))

        def ones() -> DrafterParam:
            return DrafterParam(jnp.ones(d, jnp.float32))

        self.fuse = matrix(d, 2 * d)
        self.qkv = matrix(query + 2 * kv, d)
        self.out = matrix(d, query)
        self.gate_up = matrix(2 * f, d)
        self.down = matrix(d, f)
        self.hidden_norm, self.feature_norm, self.attn_norm, self.mlp_norm = ones(), ones(), ones(), ones()
        self.norm = DrafterParam(jnp.asarray(origin.norm, jnp.float32))  # starts as the base model's final norm

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
        (cache,) = attention.init_caches(self.architecture, 1, batch, slots, dtype)
        return cache

    def prefill(self, state: LayerCache, hidden: jax.Array, before: Features, positions: jax.Array) -> LayerCache:
        _, key, value = attention.split_heads(*self._qkv(self._fuse(hidden, before.final), positions))
        return attention.write_rows(state, key, value, positions[:, 0])

    def first(
        self, state: LayerCache, committed: Committed, hidden: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        # Row 0 of the last round was its first draft and is cached with a verifier feature already. Rows 1 .. count - 1
        # are not, and the row drafted from comes after them: W rows at most, each with the feature of the row before.
        # Rows past it are computed, masked and overwritten.
        width = committed.hidden.shape[1]
        current = jnp.arange(width) == (committed.count - 1)[:, None]
        rows = jnp.where(current[..., None], hidden, jnp.roll(committed.hidden, -1, axis=1))
        positions = (committed.start + 1)[:, None] + jnp.arange(width)
        draft, state = self._run(state, rows, committed.features.final, positions)
        return jnp.take_along_axis(draft, (committed.count - 1)[:, None, None], axis=1), state

    def next(
        self, state: LayerCache, draft_hidden: jax.Array, hidden: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return self._run(state, hidden, draft_hidden, positions)

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        drafts: list[jax.Array] = []
        cached: list[tuple[jax.Array, jax.Array]] = []
        context = features.final  # of the position before: the verifier's, then the drafter's own
        for _ in range(steps):
            x = self._fuse(hidden, _shift(context, 1))
            query, key, value = attention.split_heads(*self._qkv(x, positions))
            cached.append((key, value))
            context = self._finish(x, _attend_unrolled(query, cached, positions))
            drafts.append(context)
        return drafts

    def _run(
        self, cache: LayerCache, hidden: jax.Array, context: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Rows [B, T, D] at consecutive `positions` [B, T] through the layer and its cache."""
        x = self._fuse(hidden, context, round_linear)
        qkv, heads, rope = self._qkv(x, positions, round_linear)
        mixed, cache = attention.attend_cached(qkv[None], heads, rope, cache, positions)
        return self._finish(x, mixed, round_linear), cache

    def _fuse(self, hidden: jax.Array, context: jax.Array, multiply: Product = linear) -> jax.Array:
        """Exit hidden and the state of the position before, the verifier's or the drafter's own: [B, T, D] each."""
        eps = self.architecture.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm[...], eps), rms_norm(context, self.feature_norm[...], eps)
        return _project(self.fuse, jnp.concatenate(normed, axis=-1), multiply)

    def _qkv(
        self, x: jax.Array, positions: jax.Array, multiply: Product = linear
    ) -> tuple[jax.Array, attention.Heads, attention.Rope]:
        """Fused queries, keys and values of x [B, T, D], how to split them, and how to turn them."""
        config = self.architecture
        frequencies = attention.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        qkv = _project(self.qkv, rms_norm(x, self.attn_norm[...], config.rms_norm_eps), multiply)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        return qkv, heads, attention.rope_tables(frequencies, positions)

    def _finish(self, x: jax.Array, mixed: jax.Array, multiply: Product = linear) -> jax.Array:
        """Everything after attention: [B, T, D] residual stream and [B, T, N*H] -> draft hidden [B, T, D]."""
        eps = self.architecture.rms_norm_eps
        x = x + _project(self.out, mixed, multiply)
        normed = rms_norm(x, self.mlp_norm[...], eps)
        gate, up = jnp.split(_project(self.gate_up, normed, multiply), 2, axis=-1)
        x = x + _project(self.down, jax.nn.silu(gate) * up, multiply)
        return rms_norm(x, self.norm[...], eps)


def _project(weight: DrafterParam, x: jax.Array, multiply: Product) -> jax.Array:
    return multiply(x, weight[...].astype(x.dtype))


def _shift(x: jax.Array, by: int, axis: int = 1) -> jax.Array:
    """x moved `by` positions later along `axis`, zeros in front."""
    moved = jnp.roll(x, by, axis=axis)
    index = jnp.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return jnp.where(index < by, 0, moved)


def _attend_unrolled(query: jax.Array, cached: list[tuple[jax.Array, jax.Array]], positions: jax.Array) -> jax.Array:
    """Attention of draft step j = len(cached) - 1 as decoding will see it. query [B, T, N, H]; key, value [B, K, T, H].

    The row at t sees the rows up to t - j as the first draft cached them (with verifier features), and row t - j + i as
    step i cached it.
    """
    step = len(cached) - 1
    batch, tokens, heads, size = query.shape
    grouped = query.reshape(batch, tokens, cached[0][0].shape[1], -1, size)  # [B, T, K, G, H]
    distance = positions[:, :, None] - positions[:, None, :]
    scores = attention.wide_einsum("btkgh,bksh->bkgts", grouped, cached[0][0])
    scores = jnp.where((distance >= step)[:, None, None], scores, -jnp.inf)
    own = [(_shift(k, step - i, axis=2), _shift(v, step - i, axis=2)) for i, (k, v) in enumerate(cached) if i]
    recent = [attention.wide_einsum("btkgh,bkth->bkgt", grouped, k) for k, _ in own]
    scores = jnp.concatenate([scores, *(r[..., None] for r in recent)], axis=-1) / math.sqrt(size)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    mixed = attention.wide_einsum("bkgts,bksh->btkgh", weights[..., :tokens], cached[0][1])
    for i, (_, value) in enumerate(own):
        mixed += attention.wide_einsum("bkgt,bkth->btkgh", weights[..., tokens + i], value)
    return mixed.astype(query.dtype).reshape(batch, tokens, heads * size)
