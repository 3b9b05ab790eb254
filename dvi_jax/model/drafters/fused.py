"""A decoder layer on the exit hidden state fused with the verifier's feature of the previous position.

The verifier's final hidden state f(t-1) is always known for the first draft of a round: the verifier chose the current
token there. Later drafts use the layer's own output in its place. After a round, the cache rows of the committed
positions are computed again with verifier features, in the pass of the next round's first draft, so the context always
looks as it did in training. (EAGLE, arXiv 2401.15077; training on the mix of both kinds of feature, and inner layers
joined with the final hidden state where `taps` name some: EAGLE-3, arXiv 2503.01840.)
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.decode_products import round_linear
from dvi_jax.model.drafters import layer
from dvi_jax.model.drafters.base import BranchRows, Committed, Origin, StepDrafter
from dvi_jax.model.drafters.inner import joined
from dvi_jax.model.drafters.layer import DraftLayer, Geometry, LayerWeights, Product, random_matrix
from dvi_jax.model.drafters.unrolled import attend_text, later, rows_at
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
    foretells = True

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

    def foretelling(self, hidden: jax.Array, features: Features) -> jax.Array:
        # Inner layers are left out: once the drafter's own state stands in for the verifier's, they are not there.
        one, eps = jnp.ones(hidden.shape[-1], hidden.dtype), self.architecture.rms_norm_eps
        return jnp.concatenate([rms_norm(x, one, eps) for x in (hidden, later(features.final, 1))], axis=-1)

    def foretell(self, weights: jax.Array) -> None:
        # The layer says nothing at first. Only its last matrices are zero: gradients reach these, and then the rest.
        self.out.set_value(jnp.zeros_like(self.out[...]))
        self.down.set_value(jnp.zeros_like(self.down[...]))
        norm = self.norm[...]
        unscaled = weights / jnp.where(norm == 0, 1, norm)[:, None]  # the norm comes behind the map
        self.fuse.set_value(unscaled.astype(norm.dtype))
        if self.taps:
            d, states = self.join[...].shape
            self.join.set_value(jnp.eye(d, states, dtype=norm.dtype))  # the final hidden state alone
        self.hidden_norm.set_value(jnp.ones_like(norm))
        self.feature_norm.set_value(jnp.ones_like(norm))

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        return self._unroll(hidden, features, positions, steps, None)[0]

    def unroll_branches(
        self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int, branches: BranchRows
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        return self._unroll(hidden, features, positions, steps, branches)

    def _unroll(
        self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int, branches: BranchRows | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The drafts at every position of the text, and those behind `branches`."""
        drafts: list[jax.Array] = []
        behind: list[jax.Array] = []
        cached: list[tuple[jax.Array, jax.Array]] = []
        context = self._seen(features)  # of the position before: the verifier's, then the drafter's own
        weights, geometry = self._weights(hidden), Geometry.of(self.architecture)
        distance = positions[:, :, None] - positions[:, None, :]

        def finished(x: jax.Array, mixed: jax.Array) -> jax.Array:
            x = layer.after_attention(x, mixed, weights, geometry.eps)
            return rms_norm(x, self.norm[...], geometry.eps)

        for step in range(steps):
            # The row at t sees the rows up to t - step as the first draft cached them, with verifier features, and row
            # t - step + i as draft i cached it: that is how decoding will see them.
            if branches is not None and step:
                at = branches.positions
                before = jnp.take_along_axis(context, jnp.maximum(at - 1, 0)[..., None], axis=1)
                x = linear(*self._fusion(branches.hidden, before))
                query, *pair = self._heads(x, at)
                places = [at - step + i for i in range(len(cached))]
                own = [(rows_at(k, p), rows_at(v, p)) for p, (k, v) in zip(places[1:], cached[1:], strict=True)]
                seen = at[..., None] - positions[:, None, :] >= step
                mixed = attend_text(query, *cached[0], seen, [*own, (pair[0], pair[1])])
                behind.append(finished(x, mixed))
            x = linear(*self._fusion(hidden, later(context, 1)))
            query, *pair = self._heads(x, positions)
            cached.append((pair[0], pair[1]))
            own = [(later(k, step - i, axis=2), later(v, step - i, axis=2)) for i, (k, v) in enumerate(cached) if i]
            context = finished(x, attend_text(query, *cached[0], distance >= step, own))
            drafts.append(context)
        return drafts, behind

    def _run(
        self, cache: LayerCache, hidden: jax.Array, context: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Rows [B, T, D] at consecutive `positions` [B, T] through the layer and its cache."""
        geometry = Geometry.of(self.architecture)
        both, weight = self._fusion(hidden, context)
        residual = layer.begin_round(both, self.architecture.head_dim, weight)
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
