"""Drafters for tests alone: they look at inner layers of the verifier, which no drafter of the package does yet."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.model.drafters import BlockDrafter, StepDrafter
from dvi_jax.model.features import Features
from dvi_jax.model.products import linear
from dvi_jax.model.variables import DrafterParam


def _mixed(features: Features, weight: jax.Array) -> jax.Array:
    """Final hidden state plus a product of the taps: [B, T, D]."""
    taps = features.taps.reshape(*features.taps.shape[:-2], -1)
    return features.final + linear(taps, weight.astype(taps.dtype))


class TappedStep(StepDrafter):
    """Drafts from the exit hidden state and what the layers above it made of the position before."""

    kind = "tapped_step"
    taps = (1, 2)

    def __init__(self, origin, options):
        self.options = options
        size = origin.config.hidden_size
        self.weight = DrafterParam(jax.random.normal(origin.key, (size, 2 * size), jnp.float32) * size**-0.5)

    def first(self, state, committed, hidden, position):
        mixed = _mixed(committed.features, self.weight[...])
        return hidden + jnp.take_along_axis(mixed, (committed.count - 1)[:, None, None], axis=1), state

    def next(self, state, draft_hidden, hidden, position):
        return hidden + draft_hidden, state

    def unroll(self, hidden, features, positions, steps):
        before, drafts = _mixed(features, self.weight[...]), []
        for _ in range(steps):
            before = hidden + jnp.pad(before, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            drafts.append(before)
        return drafts


class TappedBlock(BlockDrafter):
    """Three drafts from the token they follow and the taps of the position before it."""

    kind = "tapped_block"
    taps = (1, 2)
    max_drafts = 3

    def __init__(self, origin, options):
        self.options = options
        size = origin.config.hidden_size
        self.weight = DrafterParam(jax.random.normal(origin.key, (3, size, 2 * size), jnp.float32) * size**-0.5)

    def propose(self, state, committed, anchor, drafts):
        last = Features(*(self._last(x, committed.count) for x in committed.features))
        return jnp.concatenate([anchor + x for x in self._all(last)[:drafts]], axis=1), state

    def unroll(self, hidden, features, positions, steps):
        # Draft j at row t began at the anchor in row t - j, with the features of the row before that.
        def later(x, by):
            return jnp.pad(x, ((0, 0), (by, 0), (0, 0)))[:, : x.shape[1]]

        return [later(hidden, j) + later(x, j + 1) for j, x in enumerate(self._all(features))]

    def _all(self, features):
        return [_mixed(features, self.weight[...][j]) for j in range(3)]

    @staticmethod
    def _last(x, count):
        return jnp.take_along_axis(x, (count - 1).reshape(-1, *[1] * (x.ndim - 1)), axis=1)


PROBES = (TappedStep, TappedBlock)
