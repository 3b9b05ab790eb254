"""Products of rows with weights stored [out, in], and the sum of partial products.

Weights are contracted on their last axis, so that a matrix-vector product reads them as they lie in memory. Rounds on a
GPU have products of their own (`decode_products.py`).

Letters: P parts.
"""

from __future__ import annotations

import operator
from functools import reduce

import jax
import jax.numpy as jnp

from dvi_jax.model.quantised import Matrix, Quantised

MOST_UNPACKED = 1 << 17  # weights that a CPU unpacks at a time, half a megabyte: its caches hold them


def linear(x: jax.Array, weight: Matrix, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out]; accumulated in float32, given in `out_dtype` or x's dtype."""
    result = _by_blocks(x, weight) if isinstance(weight, Quantised) else _sums(x, weight)
    return result.astype(out_dtype or x.dtype)


def _sums(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision(x),
        preferred_element_type=jnp.float32,
    )


def _by_blocks(x: jax.Array, weight: Quantised) -> jax.Array:
    """`_sums` with a quantised weight, of which no more than a block is unpacked at a time.

    A loop, since of a decode loop's constants XLA would unpack all before it, and keep them.
    """
    out, width = weight.shape
    most = MOST_UNPACKED if jax.default_backend() == "cpu" else out * width
    count = next(n for n in range(1, out + 1) if out % n == 0 and out // n * width <= max(most, width))
    blocks = jax.tree.map(lambda part: part.reshape(count, out // count, *part.shape[1:]), weight)

    lefts = weight.inputs_of_planes(x) if weight.is_packed else []

    def sums(block: Quantised) -> jax.Array:
        if block.is_packed:
            first, *others = (_sums(*pair) for pair in zip(lefts, block.planes(x.dtype), strict=True))
            return sum(others, first)
        if block.is_grouped:
            return _sums(x, block.dequantised(x.dtype))
        return _sums(x, block.values.astype(x.dtype)) * block.scales  # one scale a channel can wait for the sum

    return jnp.moveaxis(jax.lax.map(sums, blocks), 0, -2).reshape(*x.shape[:-1], out)


def total(parts: jax.Array, dtype: jnp.dtype, bias: jax.Array | None = None) -> jax.Array:
    """Sum of parts [P, ..., out], and of `bias` [out] where there is one, rounded once, as the whole would be.

    One part after the other: how a compiler orders a reduction may depend on how many rows there are.
    """
    whole = reduce(operator.add, parts)
    if bias is not None:
        whole = whole.astype(jnp.float32) + bias.astype(jnp.float32)
    return whole.astype(dtype)


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full precision for float32 operands: accelerators would otherwise round them to TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def compute_capability() -> tuple[int, ...]:
    """(major, minor) of the first device where it is an NVIDIA GPU, else ()."""
    device = jax.devices()[0]
    numbers = str(getattr(device, "compute_capability", "")).split(".")  # AMD's have names
    return tuple(map(int, numbers)) if device.platform == "gpu" and all(map(str.isdecimal, numbers)) else ()


def has_gpu_kernels(dtype: jnp.dtype) -> bool:
    """Whether the default backend has kernels for it, cuDNN's attention and our own, for arrays of this type."""
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
