"""What a GPU would run in a round, counted without one: XLA compiles for an H100 that is not there.

    python -m experiments.gpu_programs --shape smollm2 --plans plain chain:3 tree:8 --batches 1 8
    python -m experiments.gpu_programs --shape smollm2 --layers 2 --plans chain:3 --list

In a round of a small model every kernel costs one to two microseconds, whatever it does. Counted are those of a round's
program: kernels of our own, and what XLA has made of the rest. XLA chooses the blocks of its own products by measuring,
which it cannot here; nothing is timed. `--list` names them in the order in which they run. It takes jax 0.11 or newer
and XLA's compiler for GPUs, whose packages it names where they are missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from dvi_jax.config import LlamaConfig
from dvi_jax.decode.memory import abstract_state
from dvi_jax.decode.plan import Plan, check_plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.model.products import compute_capability
from dvi_jax.presets import SHAPES
from dvi_jax.quantisation import BFLOAT16, WEIGHTS, chosen_storage
from experiments.fewer_bits import sizes
from experiments.measure import abstract_model
from experiments.trace_events import parsed

KIND = "NVIDIA H100 80GB HBM3"
CORES = 132
GROUP = 64  # inputs that share a scale, of weights in four bits
# What XLA is told of the device, as its `GpuTargetConfigProto`.
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {CORES} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{KIND}"
"""
OURS = "__gpu$xla.gpu.triton"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
# What is no work on the device.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")


class Launched(NamedTuple):
    """A kernel, or a copy."""

    name: str
    shape: str  # of what it writes
    scope: str  # where in the program it is from
    is_ours: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, print a table."""
    parser = ArgumentParser(prog="python -m experiments.gpu_programs", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, help="the first so many of them (all unless named)")
    parser.add_argument("--plans", nargs="+", default=["plain", "chain:3", "tree:8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--drafter", default="fused")
    parser.add_argument("--exit-layer", type=int, default=1)
    parser.add_argument("--weights", choices=WEIGHTS, default=BFLOAT16, help="what matrices are kept in")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache at the start")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--list", action="store_true", help="each kernel, in order")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and nobody looks for the GPU's libraries
    whole = SHAPES[options.shape]
    if options.layers is not None and not 1 < options.layers <= whole.num_layers:
        raise UserError(f"--layers must be between 2 and {whole.num_layers}, got {options.layers}")
    shape = replace(whole, num_layers=options.layers or whole.num_layers)
    table = Table("plan", "batch", "kernels", "ours", "XLA's", "workspace, KiB")
    for plan in map(Plan.parse, options.plans):
        for batch in options.batches:
            program = compiled(shape, plan, batch, options)
            found = launched(program.as_text())
            ours = sum(each.is_ours for each in found)
            workspace = program.memory_analysis().temp_size_in_bytes >> 10
            table.add_row(*map(str, (plan, batch, len(found), ours, len(found) - ours, workspace)))
            for each in found if options.list else ():
                print(f"{plan} {'ours' if each.is_ours else 'XLA '} {each.scope or each.name:60} {each.shape}")
    Console().print(table)
    return 0


def compiled(shape: LlamaConfig, plan: Plan, batch: int, options: argparse.Namespace) -> Any:
    """The decode loop of a plan, compiled for the GPU that is not there."""
    _, how = chosen_storage(options.weights, None, group=GROUP, head=False)
    model = abstract_model(shape, BFLOAT16, options.exit_layer, options.drafter, how)
    check_plan(plan, options.drafter, drafts_blocks=model.drafts_blocks, max_drafts=model.max_drafts)
    here = NamedSharding(Mesh(np.array(hopper().devices), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = jax.eval_shape(lambda p: model.with_params(p).decode_params, model.params)
    state = abstract_state(model, sizes(plan, batch, options))
    knobs = jax.eval_shape(lambda: Knobs.make(0, 0.0, ()))
    with pretended_hopper():
        lowered = decode_rounds.lower(model.definition, there(params), there(state), there(knobs), plan)
    return lowered.compile()


def hopper() -> Any:
    """The device, as XLA's compiler knows it; `UserError` without the compiler."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        raise UserError(f"this takes jax 0.11 or newer; here is {jax.__version__}")
    try:
        return topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology="1x1x1")
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        needed = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
        raise UserError(f"XLA's compiler for GPUs is missing: python -m pip install {needed}") from error


@contextmanager
def pretended_hopper() -> Iterator[None]:
    """What is traced and lowered inside takes the default device for an H100."""
    gpu = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=CORES, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    ours = [module for name, module in sys.modules.items() if name.startswith("dvi_jax.")]
    with ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        stack.enter_context(patch("jax.default_backend", return_value="gpu"))
        for module in (each for each in ours if hasattr(each, compute_capability.__name__)):
            stack.enter_context(patch.object(module, compute_capability.__name__, return_value=(9, 0)))
        yield


def launched(hlo: str) -> list[Launched]:
    """The kernels and copies of the first loop in a compiled program's text, in their order."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if begins := _COMPUTATION.match(line):
            lines = computations.setdefault(begins[1], [])
        else:
            lines.append(line)
    body = re.search(r" while\(.*body=%?([\w.-]+)", hlo)
    if body is None:
        raise UserError("the program has no loop")
    return [
        Launched(line.name, _plain(line.shape), _scope(line.op_name), OURS in line.rest)
        for line in parsed(computations[body[1]])
        if line.opcode not in _NAMES
    ]


def _plain(shape: str) -> str:
    """Without layouts and comments."""
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)


def _scope(op_name: str) -> str:
    """Without what is around every operation of a round."""
    return re.sub(r"jit\(\w*\)/|while/body/|eval_jaxpr/|closed_call/", "", op_name)


if __name__ == "__main__":
    sys.exit(run_cli(main))
