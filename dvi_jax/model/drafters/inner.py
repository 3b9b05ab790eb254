"""The verifier's states of several depths as one: its final hidden state and inner layers', joined by a matrix.

A low, a middle and a high layer know of a token what the last one has forgotten (EAGLE-3, arXiv 2503.01840). Letters as
in `base.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.config import LlamaConfig
from dvi_jax.model.features import Features
from dvi_jax.model.residual import rms_norm


def spread_taps(config: LlamaConfig) -> tuple[int, ...]:
    """Up to four layers from low to high, for a drafter that names none."""
    last = config.num_layers - 1
    return tuple(sorted({min(max(round(share * config.num_layers), 1), last) for share in (0.07, 0.3, 0.53, 0.77)}))


def joined(features: Features, eps: float) -> jax.Array:
    """The final hidden state and every tapped one, each of unit size, side by side: [B, T, (A + 1) D]."""
    final = features.final
    states = final[..., None, :]
    if features.taps is not None:
        states = jnp.concatenate([states, features.taps], axis=-2)
    normed = rms_norm(states, jnp.ones(final.shape[-1], final.dtype), eps)
    return normed.reshape(*final.shape[:-1], -1)
