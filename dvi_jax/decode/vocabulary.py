"""What a round asks of logits over the vocabulary, of which each of several devices may have a part.

Devices then exchange their best tokens, never their logits (`shards` is n, 1 for the whole vocabulary). Of equals the
first token wins, as on one device. Letters: V vocabulary, n devices, K tokens asked for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.decode.selection import top
from dvi_jax.model import exchange


def best(logits: jax.Array, shards: int) -> jax.Array:
    """The most probable token, int32 [...], by logits [..., V/n]."""
    if shards == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    values, tokens = _best_of_each(logits)
    return _of_winner(values, tokens)


def best_and_share(logits: jax.Array, shards: int) -> tuple[jax.Array, jax.Array]:
    """`best`, and its softmax probability float32 [...]."""
    if shards == 1:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The top token's probability; exp(max - logsumexp) would lose an ulp of the largest logit.
        return token, 1.0 / jnp.sum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    sums = jnp.sum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    values, tokens, sums = _best_of_each(logits, sums)
    return _of_winner(values, tokens), 1.0 / jnp.sum(sums * jnp.exp(values - jnp.max(values, axis=0)), axis=0)


def best_few(logits: jax.Array, count: int, shards: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` best tokens' logits and int32 ids, [..., K] each, the best first; logsumexp of all, [..., 1]."""
    values, tokens = top(logits, count)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if shards == 1:
        return values, tokens, total
    tokens += exchange.first_id(logits.shape[-1])
    packed = jnp.concatenate([_bits(values), tokens, _bits(total)], axis=-1)
    each = jnp.moveaxis(exchange.from_each(packed), 0, -2)  # [..., n, 2K + 1]
    candidates = [x.reshape(*x.shape[:-2], -1) for x in (each[..., :count], each[..., count:-1])]
    values, index = top(_floats(candidates[0]), count)
    total = jax.nn.logsumexp(_floats(each[..., -1]), axis=-1, keepdims=True)
    return values, jnp.take_along_axis(candidates[1], index, axis=-1), total


def _best_of_each(logits: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Of each device the largest logit, its token, and `others` float32 [...]: [n, ...] each, in one message."""
    index = jnp.argmax(logits, axis=-1).astype(jnp.int32) + exchange.first_id(logits.shape[-1])
    packed = jnp.stack([index, *map(_bits, (jnp.max(logits, axis=-1), *others))], axis=-1)
    tokens, values, *rest = jnp.moveaxis(exchange.from_each(packed), -1, 0)
    return _floats(values), tokens, *map(_floats, rest)


def _of_winner(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """The token [...] of the device whose value is the largest, the first of equals: [n, ...] each."""
    winner = jnp.argmax(values, axis=0)
    return jnp.take_along_axis(tokens, winner[None], axis=0)[0]


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
