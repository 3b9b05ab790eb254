"""Keys and values in 8 bits: what the KV cache keeps of a row, and how it is read.

A row, the keys or values of one position in one KV head, is quantised once, when it is written, by `quantised`; that
function serves einsums and kernels alike. Every reader sees what was kept, also in the pass that wrote it: a row must
not care whether it is new. Scores are multiplied by the key's scale and weights by the value's behind and before the
products, which take the 8 bits themselves, so nobody needs the cache as it was.

Letters as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.config import WHOLE_KV

KINDS = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}  # of what `config.KV` names
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # that the 8 bits are used up to
_SMALLEST_SCALE = 1e-30  # of a row of zeros, which must not be divided by zero


class Kept(NamedTuple):
    """Keys or values of a layer in 8 bits: row = scale * values."""

    values: jax.Array  # int8 or float8_e4m3fn [B, K, S, H]
    scales: jax.Array  # [B, K, S, 1], in the dtype of what was kept

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is kept: (B, K, S, H)."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is kept, which is also that of queries."""
        return self.scales.dtype

    def dequantised(self) -> jax.Array:
        """What it stands for, [B, K, S, H], worked out in float32 and rounded once to `dtype`."""
        whole = self.values.astype(jnp.float32) * self.scales.astype(jnp.float32)
        return whole.astype(self.dtype)


Rows = jax.Array | Kept  # keys or values [B, K, S, H]


def empty(shape: tuple[int, ...], dtype: jnp.dtype, kv: str) -> Rows:
    """Zeros of `shape` (B, K, S, H), for rows of `dtype` kept as `kv` says, one of `config.KV`."""
    if kv == WHOLE_KV:
        return jnp.zeros(shape, dtype)
    return Kept(jnp.zeros(shape, KINDS[kv]), jnp.zeros((*shape[:-1], 1), dtype))


def row_bytes(head_dim: int, dtype: jax.typing.DTypeLike, kv: str) -> int:
    """Bytes of the keys or values of one position and KV head, kept as `kv` says, one of `config.KV`."""
    rows = jax.eval_shape(lambda: empty((1, 1, 1, head_dim), jnp.dtype(dtype), kv))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))


def quantised(pieces: Sequence[jax.Array], kind: jnp.dtype, dtype: jnp.dtype) -> tuple[list[jax.Array], jax.Array]:
    """Rows in 8 bits of `kind`, symmetrically: pieces [..., H/n], n of which are a row, and scales [..., 1].

    The scale takes a row's largest element to the largest that 8 bits hold, and is rounded to `dtype` before it is
    used; so |row - scale * values| <= scale / 2 with int8, and of float8 half a step of its own.
    """
    wide = [piece.astype(jnp.float32) for piece in pieces]
    largest = _LARGEST[jnp.dtype(kind).name]
    top = jnp.max(jnp.abs(wide[0]), axis=-1, keepdims=True)
    for piece in wide[1:]:
        top = jnp.maximum(top, jnp.max(jnp.abs(piece), axis=-1, keepdims=True))
    scale = jnp.maximum(top / largest, _SMALLEST_SCALE).astype(dtype)

    def in_8_bits(piece: jax.Array) -> jax.Array:
        scaled = piece / scale.astype(jnp.float32)
        if kind == jnp.int8:
            scaled = jnp.floor(scaled + 0.5)
        return jnp.clip(scaled, -largest, largest).astype(kind)

    return [in_8_bits(piece) for piece in wide], scale


def keep(rows: jax.Array, like: Rows) -> Rows:
    """Rows [B, K, T, H] as the cache `like` keeps its own."""
    if not isinstance(like, Kept):
        return rows
    (values,), scales = quantised([rows], like.values.dtype, like.dtype)
    return Kept(values, scales)


def stored(rows: Rows) -> jax.Array:
    """What products take, [B, K, S, H]; `times_scales` does the rest."""
    return rows.values if isinstance(rows, Kept) else rows


def times_scales(x: jax.Array, rows: Rows) -> jax.Array:
    """Scores or weights float32 [B, K, G, T, S], each times the scale of its slot where rows have scales."""
    if not isinstance(rows, Kept):
        return x
    return x * rows.scales.astype(jnp.float32)[:, :, None, None, :, 0]
