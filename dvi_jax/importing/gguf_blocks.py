"""Blocks of GGUF's simple types as integers and scales, to the bit: 32 weights with a float16 scale, or a minimum too.

Layouts as in ggml (ggml-common.h): Q8_0 is scale, 32 int8; Q4_0 scale, 16 bytes; Q4_1 scale, minimum, 16 bytes. A byte
holds weight j in its low four bits and weight j + 16 in its high ones; Q4_0's are offset by 8, as our own are.
"""

from __future__ import annotations

import numpy as np

from dvi_jax.importing.rounding import packed
from dvi_jax.model.quantised import Quantised

_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8  # ggml's numbers of types
_FORMS = {_Q8_0: ("Q8_0", 8), _Q4_0: ("Q4_0", 4), _Q4_1: ("Q4_1", 4)}
_BYTES = {_Q8_0: 34, _Q4_0: 18, _Q4_1: 20}  # of a block


def form_of(kind: int) -> tuple[str, int] | None:
    """Name and bits of a type that `taken_apart` takes; None for others."""
    return _FORMS.get(kind)


def taken_apart(raw: np.ndarray, kind: int) -> Quantised:
    """Rows of bytes [n, row bytes] of a type as integers and scales."""
    blocks = raw.reshape(len(raw), -1, _BYTES[kind])

    def halves(start: int) -> np.ndarray:
        return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0]

    values = blocks[..., 4 if kind == _Q4_1 else 2 :]
    if kind == _Q8_0:
        return Quantised(np.ascontiguousarray(values).reshape(len(raw), -1).view(np.int8), halves(0))
    integers = np.concatenate([values & 15, values >> 4], axis=2)
    return Quantised(packed(integers), halves(0), halves(2) if kind == _Q4_1 else None)
