"""What a GPU would be given, without one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax


def gpu_text(function: Any, *arguments: Any) -> str:
    """The program of a jitted function as text, lowered for GPUs of Hopper's kind; what Pallas refuses shows."""
    device = getattr(jax.sharding, "AbstractDevice", None)  # jax 0.11 wants to be told which GPU
    if device is None:
        scope: Any = nullcontext()
    else:
        gpu = device(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
        scope = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu))
    with scope:
        return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
