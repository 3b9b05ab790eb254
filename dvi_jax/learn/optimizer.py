"""What every update of this package wraps its optimiser in."""

from __future__ import annotations

import optax

MAX_BAD_STEPS = 5  # non-finite updates in a row that are skipped


def guarded(optimizer: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """`optimizer` clipped by global norm; up to `MAX_BAD_STEPS` non-finite updates in a row are skipped and counted."""
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(clip_norm), optimizer), MAX_BAD_STEPS)
