"""A few layers that draft a whole block in one pass, over keys and values made of the verifier's inner states.

A committed token and what the verifier made of the position before it, at several depths, are joined by one matrix to
a *context row*; each layer has keys and values of these rows. A block is a row for each of its drafts: the newest
context row and a learned vector that says which draft it is. Rows see the context and the rows before them, so that
fewer drafts are a shorter pass (DFlash, arXiv 2602.06036, sees both ways; JetSpec, 2606.18394, is causal).

Rows do not know the drafts before them. So each draft's logits get a low-rank term of the token before it, gated by
the row, which costs no pass through the layers (the sequential head of DSpark, arXiv 2607.05147).

Letters: J drafts of a block, R rank of the sequential head, A tapped layers, and as in `layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dvi_jax.model import attention
from dvi_jax.model.attention import LayerCache
from dvi_jax.model.decode_products import round_linear
from dvi_jax.model.drafters import layer
from dvi_jax.model.drafters.base import BlockDrafter, Committed, Origin
from dvi_jax.model.drafters.inner import joined, spread_taps
from dvi_jax.model.drafters.layer import DraftLayer, Geometry, LayerWeights, Product, random_matrix
from dvi_jax.model.drafters.unrolled import attend_blocks, later
from dvi_jax.model.features import Features, check_taps
from dvi_jax.model.products import linear
from dvi_jax.model.residual import rms_norm
from dvi_jax.model.variables import DrafterParam
from dvi_jax.settings import require

State = tuple[LayerCache, ...]  # of each layer; slot s holds the context row of position s


@dataclass(frozen=True)
class BlockOptions:
    """How large the drafter is, and what it sees."""

    layers: int = 2  # decoder layers of its own
    block: int = 7  # drafts of a block
    markov_rank: int = 128  # rank of the term of the token before; 0 leaves it out
    taps: tuple[int, ...] = ()  # layers of the verifier that it sees beside the last; (): four, from low to high

    def __post_init__(self) -> None:
        require(1 <= self.layers <= 8, "layers", self.layers, "between 1 and 8")
        require(1 <= self.block <= 16, "block", self.block, "between 1 and 16")
        require(0 <= self.markov_rank <= 4096, "markov_rank", self.markov_rank, "between 0 (none) and 4096")


class ContextBlock(BlockDrafter):
    """Layers, the matrices around them, and the sequential head."""

    kind = "block"
    Options = BlockOptions

    def __init__(self, origin: Origin, options: BlockOptions):
        config = origin.config
        self.options, self.architecture = options, config
        self.max_drafts = options.block
        self.taps = check_taps(options.taps, config.num_layers) or spread_taps(config)
        d, vocabulary, rank = config.hidden_size, config.vocab_size, options.markov_rank
        keys = jax.random.split(origin.key, 5 + options.layers)
        self.layers = nnx.List([DraftLayer(config, jax.random.split(key, 4)) for key in keys[5:]])
        self.join = DrafterParam(random_matrix(keys[0], d, (len(self.taps) + 2) * d))
        # Keys and values of the context rows, of every layer.
        kv = 2 * config.num_kv_heads * config.head_dim
        self.context = DrafterParam(random_matrix(keys[1], options.layers * kv, d))
        self.places = DrafterParam(0.1 * jax.random.normal(keys[2], (options.block, d), jnp.float32))  # [J, D]
        self.context_norm, self.token_norm = (DrafterParam(jnp.ones(d, jnp.float32)) for _ in range(2))
        self.norm = DrafterParam(jnp.asarray(origin.norm, jnp.float32))  # starts as the base model's final norm
        if rank:
            self.markov_before = DrafterParam(random_matrix(keys[3], vocabulary, rank))  # [V, R]
            self.markov_gate = DrafterParam(random_matrix(keys[4], rank, d + rank))
            self.markov_after = DrafterParam(jnp.zeros((vocabulary, rank), jnp.float32))  # [V, R]

    def init_state(self, batch: int, slots: int, dtype: jnp.dtype) -> State:
        return attention.init_caches(self.architecture, self.options.layers, batch, slots, dtype)

    def prefill(self, state: State, hidden: jax.Array, before: Features, positions: jax.Array) -> State:
        return self._write(state, linear(*self._joined(hidden, before)), positions)

    def propose(self, state: State, committed: Committed, anchor: jax.Array, drafts: int) -> tuple[jax.Array, State]:
        # The context row of a token needs the verifier's features of the row before: rows 1 .. count - 1 of the last
        # round have them now, and so has the anchor. Rows past it are written too; their slots are masked, and written
        # again.
        width = committed.hidden.shape[1]
        newest = jnp.arange(width) == (committed.count - 1)[:, None]
        tokens = jnp.where(newest[..., None], anchor, jnp.roll(committed.hidden, -1, axis=1))
        context = round_linear(*self._joined(tokens, committed.features))
        state = self._write(state, context, (committed.start + 1)[:, None] + jnp.arange(width), round_linear)
        x = jnp.take_along_axis(context, (committed.count - 1)[:, None, None], axis=1)
        x = x + self.places[...][:drafts].astype(x.dtype)
        positions = (committed.start + committed.count + 1)[:, None] + jnp.arange(drafts)
        geometry = Geometry.of(self.architecture)
        residual, rope, caches = layer.begin_round(x, self.architecture.head_dim), geometry.rope(positions), []
        for own, cache in zip(self.layers, state, strict=True):
            weights = LayerWeights.of(own, x.dtype)
            residual, cache = layer.run_round(residual, weights, geometry, rope, cache, positions)
            caches.append(cache)
        return layer.finish_round(residual, self.norm[...], geometry, positions), tuple(caches)

    def unroll(self, hidden: jax.Array, features: Features, positions: jax.Array, steps: int) -> list[jax.Array]:
        geometry, eps = Geometry.of(self.architecture), self.architecture.rms_norm_eps
        context = linear(*self._joined(hidden, jax.tree.map(lambda x: later(x, 1), features)))
        x = context[:, :, None] + self.places[...].astype(hidden.dtype)  # [B, T, J, D], by the token they follow
        rope = geometry.rope(positions), geometry.rope(self._block_positions(positions))
        # What is between two layers is kept, what is inside is computed again going backward.
        run = jax.checkpoint(partial(_unrolled_layer, geometry=geometry))
        for own, (key, value) in zip(self.layers, self._context_heads(context, rope[0]), strict=True):
            x = run(x, key, value, LayerWeights.of(own, hidden.dtype), rope[1])
        drafts = rms_norm(x, self.norm[...], eps)
        return [later(drafts[:, :, j], j) for j in range(self.options.block)]

    def corrected(
        self, logits: jax.Array, draft_hidden: jax.Array, previous: jax.Array, vocabulary: jax.Array | None
    ) -> jax.Array:
        if not self.options.markov_rank:
            return logits
        dtype = draft_hidden.dtype
        after = self.markov_after[...] if vocabulary is None else self.markov_after[...][vocabulary]
        before = self.markov_before[...][jnp.maximum(previous, 0)].astype(dtype)
        both = jnp.concatenate([draft_hidden, before], axis=-1)
        gated = jax.nn.sigmoid(linear(both, self.markov_gate[...].astype(dtype))) * before
        return logits + linear(gated, after.astype(dtype), jnp.float32)

    def _joined(self, tokens: jax.Array, before: Features) -> tuple[jax.Array, jax.Array]:
        """All that a context row is made of, side by side, and the weight that makes it.

        That is a token's exit hidden state [B, T, D], and the verifier's features of the row before.
        """
        eps = self.architecture.rms_norm_eps
        states = jnp.concatenate([rms_norm(tokens, self.token_norm[...], eps), joined(before, eps)], axis=-1)
        return states, self.join[...].astype(states.dtype)

    def _context_heads(
        self, context: jax.Array, rope: attention.Rope, multiply: Product = linear
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values [B, K, T, H] of context rows [B, T, D] in every layer, the keys turned."""
        geometry = Geometry.of(self.architecture)
        _, kv_heads, size = geometry.heads
        normed = rms_norm(context, self.context_norm[...], geometry.eps)
        rows = multiply(normed, self.context[...].astype(context.dtype))
        split = rows.reshape(*context.shape[:2], self.options.layers, 2, kv_heads, size)
        return [
            (attention.apply_rope(split[:, :, i, 0], rope).swapaxes(1, 2), split[:, :, i, 1].swapaxes(1, 2))
            for i in range(self.options.layers)
        ]

    def _write(self, state: State, context: jax.Array, positions: jax.Array, multiply: Product = linear) -> State:
        """The caches with context rows [B, T, D] in the slots `positions` [B, T], which are consecutive."""
        heads = self._context_heads(context, Geometry.of(self.architecture).rope(positions), multiply)
        return tuple(
            attention.write_rows(cache, *rows, positions[:, 0]) for cache, rows in zip(state, heads, strict=True)
        )

    def _block_positions(self, positions: jax.Array) -> jax.Array:
        """Positions [B, T] of the tokens that blocks follow -> of the blocks' rows, [B, T * J]."""
        rows = positions[..., None] + 1 + jnp.arange(self.options.block)
        return rows.reshape(positions.shape[0], -1)


def _unrolled_layer(
    x: jax.Array, key: jax.Array, value: jax.Array, weights: LayerWeights, rope: attention.Rope, *, geometry: Geometry
) -> jax.Array:
    """Every block's rows x [B, T, J, D] through a layer; key, value [B, K, T, H] of the context rows."""
    batch, tokens, drafts, _ = x.shape
    flat = x.reshape(batch, tokens * drafts, -1)
    query, own_key, own_value = layer.queries_keys_values(flat, weights, geometry, rope)
    mixed = attend_blocks(query, key, value, own_key, own_value)
    return layer.after_attention(flat, mixed, weights, geometry.eps).reshape(x.shape)
