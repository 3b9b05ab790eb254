"""Decoding, rounds and distillation over meshes of devices, each beside the time that nothing could be faster than.

    python -m experiments.scaling --shape 7b --mesh model=1 --mesh model=2 --out scaling.json --picture scaling.png

Random weights, made on the devices that keep them. A number is the median of five runs after a first one. The floor of
a pass is what its device must do at the least: read its part of weights and caches, at the rate at which a large array
is copied in the same process, and exchange the parts of its sums, at the time of a bare exchange.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import LlamaConfig, MeshConfig
from dvi_jax.decode.memory import Sizes, abstract_state
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import STATE_SPECS, DecodeState, Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.mesh import MODEL, WHOLE, bytes_of, make_mesh, place_shapes, run_sharded, specs_for, spread
from dvi_jax.model import exchange
from dvi_jax.model.llama import base_shapes
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import SHAPES

RUNS = 5
ROUNDS = 48  # of one run
SLOTS = 256  # of the caches
PROMPT = 16
EXCHANGES = 200  # of one run
COPIED = 2**30  # bytes of the array whose copying is timed


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    shape: str
    mesh: str
    what: str  # `plain`, or a plan
    batch: int
    ms: float  # of a round: of a token, if plain
    floor_ms: float
    bytes_read: int  # by one device, of weights and caches
    copy_gb_per_s: float  # read and written
    exchange_us: float  # 0 on one device
    first_seconds: float  # of the first call, compiling included


def random_model(config: LlamaConfig, mesh: Mesh | None, drafter: str, dtype: str) -> LoadedModel:
    """Random weights, each made where it stays; norms are 1."""
    shapes = place_shapes(mesh, config, base_shapes(config))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        make = jax.jit(_make, static_argnames=("shape", "dtype", "ones"), out_shardings=leaf.sharding)
        made.append(make(key, shape=leaf.shape, dtype=dtype, ones=path[-1].key.endswith("norm")))
    manifest = Manifest(
        source="random", source_sha256="", dtype=dtype, exit_layer=max(1, config.num_layers // 4), drafter=drafter
    )
    definition, params = split(build_model(config, manifest, jax.tree.unflatten(tree, made), mesh=mesh), mesh)
    params = params._replace(drafter=spread(mesh, params.drafter), lora_s=spread(mesh, params.lora_s))
    return LoadedModel(config, manifest, definition, params)


def _make(key: jax.Array, shape: tuple[int, ...], dtype: str, ones: bool) -> jax.Array:
    if ones:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(0.02, dtype)


def begun_state(model: LoadedModel, batch: int, width: int) -> DecodeState:
    """Generations of which a prompt of zeros lies in the caches, without the prefill's compiling."""
    mesh = model.definition.mesh
    shapes = abstract_state(model, Sizes(batch, SLOTS, width, PROMPT))
    specs = specs_for(STATE_SPECS, shapes)

    def zeros() -> DecodeState:
        state: DecodeState = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ones = jnp.ones_like(state.length)
        committed = state.committed.replace(start=ones * (PROMPT - 1), count=ones)
        return state.replace(length=ones * (PROMPT + 1), limit=ones * SLOTS, committed=committed)

    if mesh is None:
        return jax.jit(zeros)()
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def round_ms(model: LoadedModel, plan: Plan, batch: int) -> tuple[float, float, int]:
    """Milliseconds of a round, seconds of the first call, and bytes that a device reads for one."""
    state = begun_state(model, batch, plan.drafts + 1)
    nbytes = bytes_of(model.definition.mesh, model.params.base) + bytes_of(
        model.definition.mesh, (state.shallow, state.deep)
    ) // (SLOTS // (PROMPT + ROUNDS // 2))
    params, until = model.decode_params, 0

    def run() -> None:
        nonlocal state, until
        # Lengths begin anew, so that all runs read as much of the caches.
        state = state.replace(length=jnp.full_like(state.length, PROMPT + 1), done=jnp.zeros_like(state.done))
        state = state.replace(rounds=jnp.zeros_like(state.rounds))
        state = decode_rounds(model.definition, params, state, Knobs.make(plan.drafts, 0.0, (), until=ROUNDS), plan)
        jax.block_until_ready(state)

    seconds, first = _timed(run)
    return 1e3 * seconds / ROUNDS, first, nbytes


def exchange_us(mesh: Mesh | None, rows: int, size: int) -> float:
    """Microseconds in which devices get each other's parts of `rows` sums of `size`, as between two products."""
    if mesh is None or mesh.shape[MODEL] == 1:
        return 0.0

    def many(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, EXCHANGES, lambda _, x: 0.5 * jnp.sum(exchange.joined_parts(x[None]), axis=0), x)

    run = jax.jit(run_sharded(mesh, many, (WHOLE,), WHOLE))
    x = jnp.ones((rows, size), jnp.float32)
    seconds, _ = _timed(lambda: jax.block_until_ready(run(x)))
    return 1e6 * seconds / EXCHANGES


def copy_rate() -> float:
    """Bytes a second that one device reads and writes while it copies a large array."""
    x = jnp.zeros(COPIED // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds, _ = _timed(lambda: jax.block_until_ready(copy(x)))
    return 2 * x.nbytes / seconds


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of five runs, and those of one before."""
    times = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:])), times[0]


def measure(shape: str, mesh_shape: MeshConfig, plans: list[str], batches: list[int], drafter: str) -> list[Row]:
    """The rows of one shape on one mesh."""
    config, mesh = SHAPES[shape], make_mesh(mesh_shape)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    rate = copy_rate()
    model = random_model(config, mesh, drafter, dtype)
    rows = []
    for batch in batches:
        for text in plans:
            plan = Plan.parse(text)
            ms, first, nbytes = round_ms(model, plan, batch)
            exchange = exchange_us(mesh, max(16, batch * plan.rows // mesh_shape.data), config.hidden_size)
            floor = 1e3 * nbytes / rate + 1e-3 * exchange * (2 * config.num_layers + 2)
            rows.append(Row(shape, str(mesh_shape), text, batch, ms, floor, nbytes, rate / 1e9, exchange, first))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """One row for people."""
    return (
        f"{row.shape:8}{row.mesh:16}{row.what:12}batch {row.batch:3}  {row.ms:8.3f} ms  floor {row.floor_ms:7.3f}"
        f"  exchange {row.exchange_us:5.1f} us  copies {row.copy_gb_per_s:5.0f} GB/s  first {row.first_seconds:.0f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line as each comes, and write what was asked for."""
    options = _parser().parse_args(arguments)
    unknown = [shape for shape in options.shape if shape not in SHAPES]
    if unknown:
        raise UserError(f"--shape {unknown[0]}: known are {', '.join(SHAPES)}")
    rows = [
        row
        for shape in options.shape
        for text in options.mesh
        for row in measure(shape, MeshConfig.parse(text), options.plan, options.batch, options.drafter)
    ]
    if options.out:
        device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        Path(options.out).write_text(json.dumps(device | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.scaling", description="Times over meshes of devices.")
    parser.add_argument("--shape", nargs="+", default=["7b"], metavar="NAME", help="presets")
    parser.add_argument("--mesh", nargs="+", default=["data=1,model=1"], metavar="MESH", help="such as model=2")
    parser.add_argument("--plan", nargs="+", default=["plain"], metavar="PLAN", help="rounds to measure")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="sequences at once")
    parser.add_argument("--drafter", default="exit_head", metavar="NAME", help="of the plans")
    parser.add_argument("--out", metavar="FILE.json", help="write the rows")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
