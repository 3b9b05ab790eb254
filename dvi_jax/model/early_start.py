"""Kernels of a round that let the next one begin before they end (CUDA's programmatic dependent launch).

From Hopper on XLA launches a kernel so that its programs may be brought to the multiprocessors while those of the
kernel before still run; its first instruction waits until that kernel has ended and all that it wrote can be read
(`griddepcontrol.wait`). Unasked that gains little, for the next kernel comes only once the last program has ended. A
program that says so at its start (`griddepcontrol.launch_dependents`) hides the way there: a thirtieth of a token where
kernels take microseconds. It changes no bit: nothing of the next kernel runs before the wait.

Programs that came early lie where there was room, not evenly. So a kernel says so only where the next has few programs,
or little to read.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas import triton as plt

from dvi_jax.model.products import compute_capability

MOST_WIDTH = 2048  # of a row, up to which the product after a small kernel loses nothing by where its programs lie
_HOPPER = (9, 0)
_ASSEMBLY = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"


def next_may_start(numbers: jax.Array, *, inline: bool) -> jax.Array:
    """`numbers` [...] of 32 bits as they are; a kernel of Pallas for Triton that uses them says so before.

    What a compiler knows of them, such as that they are neighbours, it no longer knows. `inline`: whether a GPU runs
    the kernel, and not an interpreter.
    """
    if not inline or compute_capability() < _HOPPER:
        return numbers
    (same,) = plt.elementwise_inline_asm(
        _ASSEMBLY,
        args=[numbers],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(numbers.shape, numbers.dtype)],
    )
    return same


def product_may_start(numbers: jax.Array, width: int, *, inline: bool) -> jax.Array:
    """`next_may_start` where a product of rows `width` wide comes next, unless that is too large to gain by it."""
    return next_may_start(numbers, inline=inline) if width <= MOST_WIDTH else numbers
