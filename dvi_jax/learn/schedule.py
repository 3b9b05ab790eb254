"""KL -> RL schedules: how the weights of imitation and policy gradient move over the updates. Pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.config import ObjectiveConfig


def linear_kl_to_rl(step: jax.Array, config: ObjectiveConfig) -> tuple[jax.Array, jax.Array]:
    """(KL weight, policy weight) at update `step`: (1, 0) for `warmup` updates, then linear over `ramp` updates to
    (`kl_min`, `pg_max`), then constant (DVI, KL -> RL schedule)."""
    progress = jnp.clip((step - config.warmup) / max(config.ramp, 1), 0.0, 1.0)
    return 1.0 + progress * (config.kl_min - 1.0), progress * config.pg_max
