"""Products of rows with weights stored [out, in], and the sum of partial products.

Weights are contracted on their last axis, so that a matrix-vector product reads them as they lie in memory. Rounds on a
GPU have products of their own (`decode_products.py`).

Letters: P parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.model.quantised import Matrix, Quantised


def linear(x: jax.Array, weight: Matrix, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out]; accumulated in float32, given in `out_dtype` or x's dtype."""
    operand, scales = _operand(weight, x.dtype)
    result = jax.lax.dot_general(
        x,
        operand,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision(x),
        preferred_element_type=jnp.float32,
    )
    if scales is not None:
        result = result * scales
    return result.astype(out_dtype or x.dtype)


def _operand(weight: Matrix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """What is multiplied with rows of `dtype`, and what the sums are still to be multiplied with: float32 [out]."""
    if not isinstance(weight, Quantised):
        return weight, None
    if weight.is_grouped:
        return weight.dequantised(dtype), None
    return weight.values.astype(dtype), weight.scales


def total(parts: jax.Array, dtype: jnp.dtype, bias: jax.Array | None = None) -> jax.Array:
    """Sum of parts [P, ..., out], and of `bias` [out] where there is one, rounded once, as the whole would be."""
    whole = parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0)
    if bias is not None:
        whole = whole.astype(jnp.float32) + bias.astype(jnp.float32)
    return whole.astype(dtype)


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full precision for float32 operands: accelerators would otherwise round them to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def has_gpu_kernels(dtype: jnp.dtype) -> bool:
    """Whether the default backend has kernels for it, cuDNN's attention and our own, for arrays of this type."""
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
