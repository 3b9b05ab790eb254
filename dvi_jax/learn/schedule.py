"""KL -> RL schedules: how the weights of imitation and policy gradient move over the updates. Pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dvi_jax.config import ObjectiveConfig


def kl_to_rl(step: jax.Array, config: ObjectiveConfig) -> tuple[jax.Array, jax.Array]:
    """(KL weight, policy weight) at update `step`: (`kl_max`, 0) during `warmup`, then towards (`kl_min`, `pg_max`).

    `linear` gets there in `ramp` updates and stays; `exponential` covers all but exp(-n / ramp) of the way in n.
    """
    after = jnp.maximum(step - config.warmup, 0) / max(config.ramp, 1)
    progress = jnp.minimum(after, 1.0) if config.schedule == "linear" else 1.0 - jnp.exp(-after)
    return config.kl_max + progress * (config.kl_min - config.kl_max), progress * config.pg_max
