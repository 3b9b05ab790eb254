"""Products of rows with weights stored [out, in], whole or as partial sums (split-K).

Weights are contracted on their last axis, so that a matrix-vector product reads them as they lie in memory. A product
of a few rows has too few results to occupy a GPU, so its sum is split into parts that are worked on side by side. XLA
does so too, but adds the parts in a kernel of its own; here they stay apart for a kernel that adds them on the way.

Letters: P parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FEW_ROWS = 16  # more rows make partial sums dearer than the kernel they spare
TILE = 64  # results of a row that one program of a product works out, about
ENOUGH = 256  # programs that keep a large GPU's memory busy
MOST_PARTS = 8
SHORTEST = 128  # terms of a part


def linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out]; accumulated in float32, given in `out_dtype` or x's dtype."""
    result = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision(x),
        preferred_element_type=jnp.float32,
    )
    return result.astype(out_dtype or x.dtype)


def split_linear(x: jax.Array, weight: jax.Array, count: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`linear` as `count` sums over equal pieces of the input: [P, ..., out], float32 unless there is but one."""
    if count == 1:
        return linear(x, weight, out_dtype)[None]
    rows, weights = x.reshape(-1, count, x.shape[-1] // count), weight.reshape(weight.shape[0], count, -1)
    numbers = (((2,), (2,)), ((1,), (1,)))
    parts = jax.lax.dot_general(rows, weights, numbers, precision=precision(x), preferred_element_type=jnp.float32)
    return parts.reshape(count, *x.shape[:-1], weight.shape[0])


def total(parts: jax.Array, dtype: jnp.dtype, bias: jax.Array | None = None) -> jax.Array:
    """Sum of parts [P, ..., out], and of `bias` [out] where there is one, rounded once, as the whole would be."""
    whole = parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0)
    if bias is not None:
        whole = whole.astype(jnp.float32) + bias.astype(jnp.float32)
    return whole.astype(dtype)


def part_count(rows: int, shape: tuple[int, int]) -> int:
    """Into how many parts to split the product of `rows` rows with a weight of `shape` (out, in): a power of two."""
    out, width = shape
    count = 1
    while rows <= FEW_ROWS and count < MOST_PARTS and out // TILE * count < ENOUGH and _divides(2 * count, width):
        count *= 2
    return count


def _divides(count: int, width: int) -> bool:
    return width % (16 * count) == 0 and width // count >= SHORTEST


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full precision for float32 operands: accelerators would otherwise round them to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def has_gpu_kernels(dtype: jnp.dtype) -> bool:
    """Whether the default backend has kernels for it, cuDNN's attention and our own, for arrays of this type."""
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
