"""What the verifier makes of a row of tokens, handed on to whoever drafts or learns from it.

Letters: B batch, T tokens, A layers that are tapped, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dvi_jax.errors import UserError


def check_taps(taps: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """`taps` as a tuple; `UserError` where they are not ascending layers of a model that has so many."""
    last = num_layers - 1
    if list(taps) != sorted(set(taps)) or not all(1 <= tap <= last for tap in taps):
        raise UserError(f"taps must be ascending layer numbers between 1 and {last}, got {list(taps)}")
    return tuple(taps)


class Features(NamedTuple):
    """The verifier's states of rows, [B, T, ...]. They flow as one through decoding, prefill, replay and learning."""

    final: jax.Array  # [B, T, D], normed final hidden state; its logits predict the next position
    taps: jax.Array | None = None  # [B, T, A, D], hidden states between layers, not normed; None where nobody asks

    @classmethod
    def of(cls, final: jax.Array, tapped: tuple[jax.Array, ...]) -> Features:
        """From a final hidden state and the tapped ones, [B, T, D] each, lowest layer first."""
        return cls(final, jnp.stack(tapped, axis=-2) if tapped else None)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], taps: int, dtype: jnp.dtype) -> Features:
        """Zeros for rows of `shape` (such as (B, T, D)) with so many `taps`."""
        inner = jnp.zeros((*shape[:-1], taps, shape[-1]), dtype) if taps else None
        return cls(jnp.zeros(shape, dtype), inner)
