"""What drafters share that are unrolled over all positions for learning: shifts, and attention of blocks.

Letters: B batch, T positions, J rows of a block, N query heads, K KV heads, G = N/K, H head size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dvi_jax.model.attention import wide_einsum

POSITIONS_AT_ONCE = 128  # whose blocks' scores are in memory


def later(x: jax.Array, by: int, axis: int = 1) -> jax.Array:
    """x moved `by` positions later along `axis`, zeros in front."""
    moved = jnp.pad(x, [(by, 0) if i == axis else (0, 0) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(moved, 0, x.shape[axis], axis=axis)


def attend_text(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    own: list[tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Rows that see positions of the text, and rows that each has for itself: [B, Q, N*H].

    query [B, Q, N, H]; key, value [B, K, T, H] of the text, of which `seen` bool [B, Q, T] says what a row sees; `own`:
    pairs [B, K, Q, H], of which row q sees the q-th.
    """
    batch, rows, heads, size = query.shape
    grouped = query.reshape(batch, rows, key.shape[1], -1, size)  # [B, Q, K, G, H]
    scores = wide_einsum("btkgh,bksh->bkgts", grouped, key)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    recent = [wide_einsum("btkgh,bkth->bkgt", grouped, k) for k, _ in own]
    scores = jnp.concatenate([scores, *(r[..., None] for r in recent)], axis=-1) / math.sqrt(size)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    tokens = key.shape[2]
    mixed = wide_einsum("bkgts,bksh->btkgh", weights[..., :tokens], value)
    for i, (_, own_value) in enumerate(own):
        mixed += wide_einsum("bkgt,bkth->btkgh", weights[..., tokens + i], own_value)
    return mixed.astype(query.dtype).reshape(batch, rows, heads * size)


def rows_at(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, K, T, H] at int32 `positions` [B, Q], those before the first taken for the first: [B, K, Q, H]."""
    return jnp.take_along_axis(x, jnp.maximum(positions, 0)[:, None, :, None], axis=2)


def attend_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, own_key: jax.Array, own_value: jax.Array
) -> jax.Array:
    """Row j of the block behind position t sees the context up to t, and its block's rows up to itself.

    The scores of all are never in memory at once.
    query [B, T*J, N, H]; context key, value [B, K, T, H]; the blocks' own [B, K, T*J, H] -> [B, T*J, N*H].
    """
    batch, rows, heads, size = query.shape
    _, kv_heads, tokens, _ = key.shape
    drafts = rows // tokens
    blocks = query.reshape(batch, tokens, drafts, kv_heads, heads // kv_heads, size)
    own = [x.reshape(batch, kv_heads, tokens, drafts, size) for x in (own_key, own_value)]
    mixed = []
    for begin in range(0, tokens, POSITIONS_AT_ONCE):
        end = min(begin + POSITIONS_AT_ONCE, tokens)
        context = key[:, :, :end], value[:, :, :end]
        mixed.append(_attend(blocks[:, begin:end], *context, *(x[:, :, begin:end] for x in own)))
    return jnp.concatenate(mixed, axis=1).reshape(batch, rows, heads * size)


@jax.checkpoint
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, own_key: jax.Array, own_value: jax.Array) -> jax.Array:
    """The last positions' blocks: query [B, C, J, K, G, H], context [B, K, S, H], own [B, K, C, J, H]."""
    count, drafts, size = query.shape[1], query.shape[2], query.shape[-1]
    slots = key.shape[2]
    position = slots - count + jnp.arange(count)
    seen = jnp.arange(slots) <= position[:, None]  # [C, S]
    before = jnp.arange(drafts) <= jnp.arange(drafts)[:, None]  # [J, J]
    # Two parts of one softmax, never laid side by side: the scores are what takes time here.
    scores = wide_einsum("bcjkgh,bksh->bkgcjs", query, key) / math.sqrt(size)
    own = wide_einsum("bcjkgh,bkcih->bkgcji", query, own_key) / math.sqrt(size)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    own = jnp.where(before, own, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), jnp.max(own, axis=-1)))[..., None]
    scores, own = jnp.exp(scores - top), jnp.exp(own - top)
    total = jnp.sum(scores, axis=-1) + jnp.sum(own, axis=-1)  # [B, K, G, C, J]
    mixed = wide_einsum("bkgcjs,bksh->bcjkgh", scores.astype(query.dtype), value)
    mixed += wide_einsum("bkgcji,bkcih->bcjkgh", own.astype(query.dtype), own_value)
    return (mixed / jnp.moveaxis(total, (3, 4), (1, 2))[..., None]).astype(query.dtype)
