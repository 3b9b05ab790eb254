"""What a round asks of logits over the vocabulary, of which each of several devices may have a part.

Devices then exchange their best tokens, never their logits (`shards` is n, 1 for the whole vocabulary). Of equals the
first token wins, as on one device. Letters: V vocabulary, n devices, K tokens asked for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.decode.selection import top
from dvi_jax.model import exchange
from dvi_jax.model.peaks import is_supported, peaks


def best(logits: jax.Array, shards: int) -> jax.Array:
    """The most probable token, int32 [...], by logits [..., V/n]."""
    if shards == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    values, tokens = _of_each(jnp.max(logits, axis=-1), _ids(jnp.argmax(logits, axis=-1), logits))
    return _of_winner(values, tokens)


def best_of_round(logits: jax.Array, shards: int) -> jax.Array:
    """`best` of a round's rows, float32: by kernels of our own, which a prefill on several devices could not load."""
    return peaks(logits, 1)[1][..., 0] if shards == 1 and is_supported() else best(logits, shards)


def best_and_share(logits: jax.Array, shards: int) -> tuple[jax.Array, jax.Array]:
    """`best`, and its softmax probability float32 [...]; of what is drafted, not for the verifier."""
    values, tokens, sums = (x[..., 0] for x in _few_and_sums(logits, 1))
    if shards == 1:
        return tokens, 1.0 / sums
    values, tokens, sums = _of_each(values, _ids(tokens, logits), sums)
    return _of_winner(values, tokens), 1.0 / jnp.sum(sums * jnp.exp(values - jnp.max(values, axis=0)), axis=0)


def best_few(logits: jax.Array, count: int, shards: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` best tokens' logits and int32 ids, [..., K] each, the best first; logsumexp of all, [..., 1].

    Of what is drafted, not for the verifier.
    """
    values, tokens, sums = _few_and_sums(logits, count)
    total = values[..., :1] + jnp.log(sums)
    if shards == 1:
        return values, tokens, total
    packed = jnp.concatenate([_bits(values), _ids(tokens, logits), _bits(total)], axis=-1)
    each = jnp.moveaxis(exchange.from_each(packed), 0, -2)  # [..., n, 2K + 1]
    candidates = [x.reshape(*x.shape[:-2], -1) for x in (each[..., :count], each[..., count:-1])]
    values, index = top(_floats(candidates[0]), count)
    total = jax.nn.logsumexp(_floats(each[..., -1]), axis=-1, keepdims=True)
    return values, jnp.take_along_axis(candidates[1], index, axis=-1), total


def _few_and_sums(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best few of this device's, [..., K] each, and the sum of exp(logit - largest) over its part, [..., 1].

    Not the logsumexp: exp(largest - logsumexp) would lose an ulp of the largest logit.
    """
    if is_supported():
        values, tokens, sums = peaks(logits, count)
        return values, tokens, sums[..., None]
    values, tokens = top(logits, count)
    return values, tokens, jnp.sum(jnp.exp(logits - values[..., :1]), axis=-1, keepdims=True)


def _ids(index: jax.Array, logits: jax.Array) -> jax.Array:
    """The token of each entry of this device's logits [..., V/n], int32."""
    return index.astype(jnp.int32) + exchange.first_id(logits.shape[-1])


def _of_each(values: jax.Array, tokens: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Of each device its largest logit, that token, and `others` float32: [...] -> [n, ...] each, in one message."""
    packed = jnp.stack([tokens, *map(_bits, (values, *others))], axis=-1)
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
