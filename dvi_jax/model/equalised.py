"""Keys whose channels are of one size, so that 8 bits with one scale for a row hold all of them.

A bias may make a few channels of the keys hundreds of times as large as the rest, of which 8 bits then hold little. No
score changes where a channel of the keys is divided and the same channel of their queries multiplied, and with powers
of two no bit does: they go through every product, through RoPE where both channels that it turns together have the
same, and through every rounding. So they are put into the rows of the weights, once, when keys are to be kept in 8
bits; no kernel and no cache knows of them. (SmoothQuant, arXiv 2211.10438, shifts sizes so from rows to weights.)

How large a channel becomes needs no data: a row behind the norm has mean square 1, so a key's channel is its bias, give
or take a few times the length of its row of weights.

Letters as in `attention.py`, and R = H/2 rotary pairs, D hidden.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dvi_jax.mesh import MODEL, WHOLE, run_sharded
from dvi_jax.model.attention import Heads
from dvi_jax.model.layers import Block
from dvi_jax.model.llama import Llama
from dvi_jax.model.quantised import Matrix, Quantised

# How many standard deviations a channel is taken to reach beyond its bias. So many that channels with a large bias stay
# the largest of their rows: scales are then about the same for all keys, and so is what rounding does to these
# channels, which a softmax does not see. With 1 Qwen2.5-Coder was worse than before, with 3 to 48 about equally good.
REACH = 8.0
_LEAST = 2.0**-20  # of the largest channel, that any is taken to be: some may be zero
_FLOAT16 = (-24, 16)  # its smallest number is 2**-24, and all are below 2**16
_ANY = 64  # exponents that no factor comes near


def keep_kv(llama: Llama, kv: str, mesh: Mesh | None) -> None:
    """Let `llama`, whose arrays lie on `mesh`, keep keys and values as `kv` says, one of `config.KV`; in place.

    Eight-bit floats have no use for equal channels, since their errors are shares of each value, and were worse so.
    """
    llama.kv = kv
    if kv == "int8":
        for layer in llama.layers:
            equalise(layer, mesh)


def equalise(layer: Block, mesh: Mesh | None) -> None:
    """Put factors into the weights of queries and keys, in place, unless they are there; arrays lie on `mesh`."""
    if not layer.is_equalised:
        bias = layer.qkv_bias[...] if layer.is_biased else None
        layer.multiply_qkv(_factors(layer.attn_norm[...], layer.qkv[...], bias, layer.heads, mesh))


@partial(jax.jit, static_argnames=("heads", "mesh"))
def _factors(norm: jax.Array, qkv: Matrix, bias: jax.Array | None, heads: Heads, mesh: Mesh | None) -> jax.Array:
    """`row_factors` of every device's part, of which `heads` are."""
    specs = (WHOLE, P(MODEL), P(MODEL))
    return run_sharded(mesh, partial(row_factors, heads=heads), specs, P(MODEL))(norm, qkv, bias)


def row_factors(norm: jax.Array, qkv: Matrix, bias: jax.Array | None, heads: Heads) -> jax.Array:
    """What rows of `qkv` [(N+2K)H, D] and `bias` are to be multiplied with, float32 [(N+2K)H]: powers of two.

    `norm` [D]: the weight of the norm before it. The geometric mean of a head's sizes stays about as it is.
    """
    n, k, size = heads
    rows = slice(n * size, (n + k) * size)
    whole = qkv.rows(rows).dequantised(jnp.float32) if isinstance(qkv, Quantised) else qkv[rows].astype(jnp.float32)
    spread = jnp.sum(jnp.square(whole * norm.astype(jnp.float32)), axis=1)
    sizes = REACH * _of_pairs(spread, k)
    if bias is not None:
        sizes = sizes + _of_pairs(jnp.square(bias[rows].astype(jnp.float32)), k)
    sizes = jnp.maximum(sizes, _LEAST * jnp.max(sizes, axis=1, keepdims=True))
    exponents = jnp.log2(jnp.maximum(sizes, 2.0**-100))  # a head of zeros has none
    less = jnp.round(exponents) - jnp.round(jnp.mean(exponents, axis=1, keepdims=True))
    less = jnp.clip(less, *_room(qkv, heads)) if isinstance(qkv, Quantised) else less
    both = jnp.concatenate([less, less], axis=1)
    more = jnp.repeat(both, n // k, axis=0)  # the queries of each KV head
    return jnp.exp2(jnp.concatenate([more.ravel(), -both.ravel(), jnp.zeros(k * size)]))


def _of_pairs(squares: jax.Array, k: int) -> jax.Array:
    """Squares of channels [K*H] -> lengths of rotary pairs [K, R]."""
    return jnp.sqrt(jnp.sum(squares.reshape(k, 2, -1), axis=1))


def _room(qkv: Quantised, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """Least and greatest exponent [K, R] that keys' rows may be divided and queries' be multiplied by, exactly.

    Scales of groups, and minima, are kept in float16, whose small numbers have fewer bits.
    """
    n, k, size = heads
    down, up = (jnp.full((n + 2 * k) * size, _ANY) for _ in range(2))  # of each row
    for part in (qkv.scales, qkv.minima):
        if part is not None and part.dtype == jnp.float16:
            mantissas, exponents = jnp.frexp(part.astype(jnp.float32))
            bits = jnp.abs(mantissas * 2.0**11).astype(jnp.int32)  # a whole number
            lowest = exponents - 11 + jnp.log2((bits & -bits).astype(jnp.float32)).astype(jnp.int32)
            down = jnp.minimum(down, jnp.min(jnp.where(bits > 0, lowest - _FLOAT16[0], _ANY), axis=1))
            up = jnp.minimum(up, jnp.min(jnp.where(bits > 0, _FLOAT16[1] - exponents, _ANY), axis=1))

    def of_pairs(rows: jax.Array) -> jax.Array:
        """The least of a KV head's queries, or keys, and of both channels of a pair: [K, R]."""
        return jnp.min(rows.reshape(k, -1, 2, size // 2), axis=(1, 2))

    queries, keys = slice(0, n * size), slice(n * size, (n + k) * size)
    least = jnp.maximum(-of_pairs(down[queries]), -of_pairs(up[keys]))
    return least, jnp.minimum(of_pairs(up[queries]), of_pairs(down[keys]))
