"""The residual stream and its norms.

Beside a product of a few rows a small kernel costs a launch and little else. So on a GPU a decoding round takes sum and
norm together, in one kernel written in Pallas for Triton, which also adds up the parts of the product before.

Letters: P parts, B batch, T tokens, R rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model.early_start import product_may_start
from dvi_jax.model.peer_memory import Inbox
from dvi_jax.model.products import total

MOST_WARPS = 32
Ref = Any  # a pointer into an array; indexing gives another, `plt.load` and `plt.store` use it


@dataclass(frozen=True)
class Residual:
    """A residual stream, and what is still to be added to it."""

    x: jax.Array  # [B, T, D]; with kernels [R, D]: all rows, and more to fill up a tile (`product_blocks.padded_rows`)
    added: jax.Array | None = None  # parts of a product, [P, ..., D]; with kernels maybe of the first rows alone
    kernels: bool = False  # a decoding round on a device with kernels for it: nothing is differentiated
    inbox: Inbox | None = None  # where other devices' parts arrive, if through peer memory

    def plus(self, parts: jax.Array) -> Residual:
        """The stream with `parts` [P, ..., D] to be added."""
        return replace(self, x=self.total(), added=parts)

    def total(self) -> jax.Array:
        """The stream with everything added: [..., D]."""
        if self.added is None:
            return self.x
        added = total(self.added, self.x.dtype)
        if len(added) < len(self.x):  # of the rows that more fill up
            added = jnp.pad(added, ((0, len(self.x) - len(added)), (0, 0)))
        return self.x + added

    def normed(self, weight: jax.Array, eps: float) -> tuple[Residual, jax.Array]:
        """The stream with everything added, and its RMSNorm with `weight` [D]: [..., D]."""
        if self.kernels:
            x, normed = add_and_norm(self.x, self.added, weight, eps)
        else:
            x = self.total()
            normed = rms_norm(x, weight, eps)
        return replace(self, x=x, added=None), normed


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with float32 statistics; cast back to x's dtype *before* the weight, as Hugging Face does."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)


@partial(jax.jit, static_argnames=("eps", "interpret"))  # traced and lowered once for all layers
def add_and_norm(
    x: jax.Array, parts: jax.Array | None, weight: jax.Array, eps: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """x [R, D] plus the sum of `parts` [P, R, D], if there are any, and the RMSNorm of that, both in x's dtype.

    Parts of the first rows alone may be given; nothing is added to the others. `interpret` runs the kernel on any
    device, for tests. It has no derivative.
    """
    rows, size = x.shape
    warps = min(MOST_WARPS, max(4, pl.next_power_of_2(size) // 128))
    summed, normed = pl.pallas_call(
        partial(_kernel, eps=eps, inline=not interpret),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows, size), x.dtype)] * 2,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="add_and_norm",
    )(x, *([] if parts is None else [parts]), weight)
    return summed, normed


def _kernel(x: Ref, *rest: Ref, eps: float, inline: bool) -> None:
    """One row; rounded where XLA's sum, addition and norm would round. `rest`: parts if any, weight, both outputs.

    `inline` as in `early_start.next_may_start`.
    """
    *parts, weight, summed, normed = rest
    row, (_, size), dtype = pl.program_id(0), x.shape, x.dtype
    lane = jnp.arange(pl.next_power_of_2(size))
    inside = lane < size
    nothing = product_may_start(jnp.zeros(lane.shape, jnp.int32), size, inline=inline)

    def load(ref: Ref, *at: Any) -> jax.Array:
        mask = inside
        if len(at) == 2 and ref.shape[1] < x.shape[0]:  # parts of fewer rows
            mask &= row < ref.shape[1]
        return plt.load(ref.at[(*at, lane)], mask=mask, other=nothing.astype(ref.dtype)).astype(jnp.float32)

    scales = load(weight).astype(dtype)  # asked for first: it waits for nothing
    here = load(x, row)
    for ref in parts:
        added = load(ref, 0, row)
        for part in range(1, ref.shape[0]):
            added += load(ref, part, row)
        here += added.astype(dtype).astype(jnp.float32)
    here = here.astype(dtype)
    wide = here.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide) / size + eps)
    plt.store(summed.at[row, lane], here, mask=inside)
    plt.store(normed.at[row, lane], scales * (wide * scale).astype(dtype), mask=inside)
