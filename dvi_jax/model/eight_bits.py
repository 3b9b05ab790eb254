"""Integers and floats of eight bits as bfloat16, in a GPU's registers.

A GPU's own conversions go one at a time and at an eighth of its other instructions' rate, so that reading bytes is no
longer what limits. Here four bytes become two registers of two by moving bits: an integer's low seven bits are set
into the mantissa of 128, from which 128 is taken off, or 256 where its sign is set; a float's exponent and mantissa are
shifted to where a bfloat16 has them, and multiplied by what its exponent then counts too little. All of it is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

PAIR = 0x10001  # what both halves of a register get
_ABOVE, _LESS = 0x4300, 0xC300  # of a bfloat16: 128, whose last bit counts one; -128, and -256 with its lowest bit set
_ONE, _WIDER = 0x3F80, 0x7B80  # 1, and 2^120, what bfloat16's exponents count from over what float8_e4m3fn's do
_SET, _JOINED = 0xEA, 0xF8  # of lop3: (a & b) | c, and a | (b & c)


def widened(values: jax.Array, dtype: jnp.dtype, *, inline: bool) -> jax.Array:
    """Values of any shape in `dtype`; int8 and float8_e4m3fn without NaN become bfloat16 as described above.

    `inline`: so, by instructions that only a GPU has, in a kernel of Pallas for Triton.
    """
    if not inline or values.dtype.itemsize > 1 or dtype != jnp.bfloat16:
        return values.astype(dtype)
    (found,) = plt.elementwise_inline_asm(
        INTEGERS if values.dtype == jnp.int8 else FLOATS,
        args=[values],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)],
    )
    return found


def _two_integers(register: str, selector: int) -> str:
    """Instructions for two bytes of the four, each in the lower half of sixteen bits at first."""
    return f"""
    prmt.b32 bytes, $2, 0, {selector:#06x};
    lop3.b32 above, bytes, {0x7F * PAIR:#x}, {_ABOVE * PAIR:#x}, {_SET:#x};
    lop3.b32 less, bytes, {0x80 * PAIR:#x}, {_LESS * PAIR:#x}, {_SET:#x};
    mov.b32 one, {_ONE * PAIR:#x};
    fma.rn.bf16x2 {register}, above, one, less;"""


def _two_floats(register: str, selector: int) -> str:
    """The same of floats, which begin in the upper half, where the sign is that of a bfloat16."""
    return f"""
    prmt.b32 bytes, $2, 0, {selector:#06x};
    shr.u32 narrow, bytes, 4;
    and.b32 narrow, narrow, {0x07F0 * PAIR:#x};
    lop3.b32 narrow, narrow, bytes, {0x8000 * PAIR:#x}, {_JOINED:#x};
    mov.b32 wider, {_WIDER * PAIR:#x};
    mov.b32 none, {0x8000 * PAIR:#x};
    fma.rn.bf16x2 {register}, narrow, wider, none;"""


INTEGERS = f"""{{
    .reg .b32 bytes, above, less, one;{_two_integers("$0", 0x4140)}{_two_integers("$1", 0x4342)}
}}"""
FLOATS = f"""{{
    .reg .b32 bytes, narrow, wider, none;{_two_floats("$0", 0x1404)}{_two_floats("$1", 0x3424)}
}}"""
