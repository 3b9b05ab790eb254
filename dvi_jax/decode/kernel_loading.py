"""Loading a round's GPU kernels before devices wait for each other.

A kernel of our own is loaded onto a device when that device first runs it, and loading waits for what runs there
already. In a program of several devices that may be an exchange with a device that waits its turn to load the same
kernel: neither would ever go on. So each device runs a round by itself first, with nothing exchanged.
"""

from __future__ import annotations

from functools import partial

import jax

from dvi_jax.decode.plan import Plan
from dvi_jax.decode.speculative import sharded_round
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import shards
from dvi_jax.model import exchange, peaks
from dvi_jax.model.products import has_gpu_kernels
from dvi_jax.model.speculative_llama import Definition, Params

# Per process, as kernels are. Greedy rounds run some that sampled ones do not.
_loaded: set[tuple[Definition, Plan, tuple[int, ...], int, bool]] = set()


def load_kernels(model: LoadedModel, state: DecodeState, knobs: Knobs, *plans: Plan) -> None:
    """Load what rounds of `plans` run, unless that was done; `state` stays as it is."""
    has_kernels = has_gpu_kernels(jax.numpy.dtype(model.manifest.dtype)) or peaks.is_supported()
    if shards(model.definition.mesh) == 1 or not has_kernels:
        return
    for plan in plans:
        key = model.definition, plan, state.committed.hidden.shape, state.tokens.shape[1], state.sampling is None
        if key not in _loaded:
            jax.block_until_ready(round_alone(model.definition, model.decode_params, state, knobs, plan))
            _loaded.add(key)


@partial(jax.jit, static_argnames=("definition", "plan"))
def round_alone(
    definition: Definition, params: Params, state: DecodeState, knobs: Knobs, plan: Plan
) -> list[jax.Array]:
    """A number of each array that a round makes when every device takes its own part for the whole: of no meaning."""
    with exchange.each_alone():
        made = sharded_round(definition, params, state, knobs, plan)
    return [leaf.ravel()[0] for leaf in jax.tree.leaves(made)]
