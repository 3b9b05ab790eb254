"""A decoder layer on the exit hidden state fused with the verifier's feature of the previous position.

The verifier's final hidden state f(t-1) is always known for the first draft of a round: the verifier chose the current
token there. Later drafts use the layer's own output in its place. After a round, the cache rows of the committed
positions are computed again with verifier features, in the pass of the next round's first draft, so the context always
looks as it did in training. (EAGLE, arXiv 2401.15077; training on the mix of both kinds of feature, and inner layers
joined with the final hidden state where `taps` name some: EAGLE-3, arXiv 2503.01840.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.decode_products import round_linear
from dvi_jax.model.drafters import layer
from dvi_jax.model.drafters.base import Committed, Origin, StepDrafter
from dvi_jax.model.drafters.inner import joined
from dvi_jax.model.drafters.layer import DraftLayer, Geometry, LayerWeights, Product, random_matrix
from dvi_jax.model.drafters.unrolled import later
from dvi_jax.model.features import Features, check_taps
from dvi_jax.model.products import linear
from dvi_jax.model.residual import rms_norm
from dvi_jax.model.variables import DrafterParam


@dataclass(frozen=True)
class FusedOptions:
    """What the drafter sees of the verifier."""

    taps: tuple[int, ...] = ()  # inner layers that are joined with its final hidden state


class Fused(StepDrafter, DraftLayer):
    """Attention and MLP on a projection of [h_k(t), f(t-1)]; heads and rotary base are the base model's."""

    kind = "fused"
    Options = FusedOptions

    def __init__(self, origin: Origin, options: FusedOptions):
        config = origin.config
        d = config.hidden_size
        fuse_key, *layer_keys = jax.random.split(origin.key, 5)
        DraftLayer.__init__(self, config, layer_keys)
        self.options = options
        self.architecture = config
        self.taps = check_taps(options.taps, config.num_layers)
        self.fuse = DrafterParam(random_matrix(fuse_key, d, 2 * d))
        if self.taps:
            key = jax.random.fold_in(origin.key, 1)
            self.join = DrafterParam(random_matrix(key, d, (len(self.taps) + 1) * d))
        self.hidden_norm, self.feature_norm = (DrafterParam(jnp.ones(d, jnp.float32)) for _ in range(2))
        self.norm = DrafterParam(jnp.asarray(origin.norm, jnp.float32))  # starts as the base model's final norm

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
        (cache,) = attention.init_caches(self.architecture, 1, batch, slots, dtype)
        return cache

    def prefill(self, state: LayerCache, hidden: jax.Array, before: Features, positions: jax.Array) -> LayerCache:
        _, key, value = self._heads(linear(*self._fusion(hidden, self._seen(before))), positions)
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
        draft, state = self._run(state, rows, self._seen(committed.features, round_linear), positions)
        return jnp.take_along_axis(draft, (committed.count - 1)[:, None, None], axis=1), state

    def next(
        self, state: LayerCache, draft_hidden: jax.Array, hidden: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return self._run(state, hidden, draft_hidden, positions)

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        drafts: list[jax.Array] = []
        cached: list[tuple[jax.Array, jax.Array]] = []
        context = self._seen(features)  # of the position before: the verifier's, then the drafter's own
        weights, geometry = self._weights(hidden), Geometry.of(self.architecture)
        for _ in range(steps):
            x = linear(*self._fusion(hidden, later(context, 1)))
            query, key, value = self._heads(x, positions)
            cached.append((key, value))
            x = layer.after_attention(x, _attend_unrolled(query, cached, positions), weights, geometry.eps)
            context = rms_norm(x, self.norm[...], geometry.eps)
            drafts.append(context)
        return drafts

    def _run(
        self, cache: LayerCache, hidden: jax.Array, context: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Rows [B, T, D] at consecutive `positions` [B, T] through the layer and its cache."""
        geometry = Geometry.of(self.architecture)
        residual = layer.begin_round(round_linear(*self._fusion(hidden, context)), self.architecture.head_dim)
        rope, weights = geometry.rope(positions), self._weights(hidden)
        residual, cache = layer.run_round(residual, weights, geometry, rope, cache, positions)
        return layer.finish_round(residual, self.norm[...], geometry, positions), cache

    def _seen(self, features: Features, multiply: Product = linear) -> jax.Array:
        """What it sees of the verifier's features [B, T, ...]: [B, T, D]."""
        if not self.taps:
            return features.final
        states = joined(features, self.architecture.rms_norm_eps)
        return multiply(states, self.join[...].astype(states.dtype))

    def _fusion(self, hidden: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Exit hidden and the state of the position before, the verifier's or the drafter's own, [B, T, D] each.

        Both normed, [B, T, 2D], and the weight that makes one of them.
        """
        eps = self.architecture.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm[...], eps), rms_norm(context, self.feature_norm[...], eps)
        return jnp.concatenate(normed, axis=-1), self.fuse[...].astype(hidden.dtype)

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of fused rows x [B, T, D]."""
        geometry = Geometry.of(self.architecture)
        return layer.queries_keys_values(x, self._weights(x), geometry, geometry.rope(positions))

    def _weights(self, like: jax.Array) -> LayerWeights:
        return LayerWeights.of(self, like.dtype)


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
    own = [(later(k, step - i, axis=2), later(v, step - i, axis=2)) for i, (k, v) in enumerate(cached) if i]
    recent = [attention.wide_einsum("btkgh,bkth->bkgt", grouped, k) for k, _ in own]
    scores = jnp.concatenate([scores, *(r[..., None] for r in recent)], axis=-1) / math.sqrt(size)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    mixed = attention.wide_einsum("bkgts,bksh->btkgh", weights[..., :tokens], cached[0][1])
    for i, (_, value) in enumerate(own):
        mixed += attention.wide_einsum("bkgt,bkth->btkgh", weights[..., tokens + i], value)
    return mixed.astype(query.dtype).reshape(batch, tokens, heads * size)
