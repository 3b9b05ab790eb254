"""Attention of a prefill's rows over a cache, as one GPU kernel in Pallas for Triton.

cuDNN reads every slot of the cache and a mask over all of them, and takes no 8 bits. This kernel reads the slots that
are filled, as a round's does (`decode_attention.py`), with more queries to a program; the rows lie there already.

Letters: B batch, T rows of a sequence in this call, N query heads, K KV heads, G = N/K, H head size, S cache slots.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dvi_jax.model import decode_attention as round_attention
from dvi_jax.model.decode_attention import STEP_SLOTS, HeadRows, Ref
from dvi_jax.model.kept_kv import Kept, Rows


class Program(NamedTuple):
    """How large one program is. Measured on H100s, 64 to 128 columns a head."""

    tile: int  # queries that it works on
    warps: int
    stages: int  # steps whose loads are under way at once


WHOLE, KEPT = Program(64, 4, 3), Program(128, 8, 2)  # of rows in the model's dtype, and in 8 bits


@partial(jax.jit, static_argnames=("interpret",))
def prefill_attention(
    query: jax.Array,
    key: Rows,
    value: Rows,
    positions: jax.Array,
    places: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Turned queries [B, T, N, H] at `positions` int32 [B, T] over slots 0 .. position of key, value [B, K, S, H].

    -> [B, T, N*H] in the queries' dtype. `places` and `interpret` as in `decode_attention.cached_attention`.
    """
    batch, tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    cache, program = jax.tree.leaves((key, value)), KEPT if isinstance(key, Kept) else WHOLE
    given = [] if places is None else [places]
    kernel = partial(_kernel, arrays=len(cache), placed=bool(given), inline=not interpret)
    return pl.pallas_call(
        partial(kernel, group=heads // kv_heads, tile=program.tile),
        grid=(batch, kv_heads, pl.cdiv(tokens * heads // kv_heads, program.tile)),
        in_specs=[
            *(round_attention.entire(array.shape) if given else round_attention.of_head(array) for array in cache),
            pl.BlockSpec((None, *query.shape[1:]), lambda b, k, t: (b, 0, 0, 0)),
            pl.BlockSpec((None, tokens), lambda b, k, t: (b, 0)),
            *(round_attention.entire(array.shape) for array in given),
        ],
        out_specs=pl.BlockSpec((None, *query.shape[1:]), lambda b, k, t: (b, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=plt.CompilerParams(num_warps=program.warps, num_stages=program.stages),
        interpret=interpret,
        name="prefill_attention",
    )(*cache, query, positions, *given).reshape(batch, tokens, heads * size)


def _kernel(*refs: Ref, arrays: int, group: int, tile: int, placed: bool, inline: bool) -> None:
    """One KV head and `tile` queries: attend over the slots up to the last of them."""
    query, positions, *rest, out = refs[arrays:]
    own = (plt.load(rest[0].at[pl.program_id(0)]), pl.program_id(1)) if placed else ()
    key, value = HeadRows.pair(refs[:arrays], inline=inline, head=own)
    tokens, _, size = query.shape
    # Queries by row, then head; what fills up the last tile does the first one's work again.
    index = pl.program_id(2) * tile + jnp.arange(tile)
    index = jnp.where(index < tokens * group, index, 0)
    token, head = index // group, pl.program_id(1) * group + index % group
    half = jnp.arange(size // 2)[None, :]
    halves = [plt.load(query.at[token[:, None], head[:, None], half + start]) for start in (0, size // 2)]
    position = plt.load(positions.at[token])
    steps = (0, pl.cdiv(jnp.max(position) + 1, STEP_SLOTS))
    slots = round_attention.cached_slots(key, value, query.dtype)
    carry = round_attention.nothing_yet(size, tile)
    mixed, _, total = round_attention.attend(carry, (halves[0], halves[1]), slots, position, 0, steps)
    column = jnp.arange(size)[None, :]
    plt.store(out.at[token[:, None], head[:, None], column], (mixed / total[:, None]).astype(out.dtype))
