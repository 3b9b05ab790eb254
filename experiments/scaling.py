"""Decoding, rounds and distillation over meshes of devices, each beside the time that nothing could be faster than.

    python -m experiments.scaling --shape 7b --mesh model=1 model=2 --what plain chain:3 --out scaling.json

Random weights, made on the devices that keep them. A number is the median of five runs after a first one. The floor of
a pass is what a device must do at the least: read its part of weights and caches, at the rate at which a large array is
copied in the same process, and exchange the parts of its sums, at the time of a bare exchange.
"""

from __future__ import annotations

import argparse
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
from dvi_jax.config import DistillConfig, LlamaConfig, MeshConfig
from dvi_jax.decode.kernel_loading import load_kernels
from dvi_jax.decode.memory import Sizes, abstract_state
from dvi_jax.decode.plan import Plan, rows_alike
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import STATE_SPECS, DecodeState, Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.plots import BLUE, GREY, new_figure
from dvi_jax.learn.distill import distill_step, init_distill
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.mesh import CACHES, MODEL, WHOLE, bytes_of, copied, make_mesh, place_shapes, run_sharded, specs_for, spread
from dvi_jax.model import exchange, peer_memory
from dvi_jax.model.drafters import DRAFTERS, BlockDrafter
from dvi_jax.model.llama import base_shapes
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import SHAPES
from experiments.measure import copy_bandwidth, environment, settings_of, write_result

RUNS = 5
ROUNDS = 48  # of one run
SLOTS = 256  # of the caches
PROMPT = 16
PASSES, EXCHANGES = 10, 64  # of one run, and of one pass
DISTILL = "distill"
ROWS, LENGTH = 32, 512  # of an update


@dataclass(frozen=True)
class Row:
    """One line of the table. `ms` is of a round (plain: of a token) or of an update."""

    shape: str
    mesh: str
    what: str  # a plan, or `distill`
    batch: int
    ms: float
    tokens_per_second: float  # that a plain round decodes, or an update learns from
    floor_ms: float  # 0 for an update
    bytes_read: int  # by one device, of weights and caches
    copy_gb_per_s: float  # bytes read and written
    exchange_us: float  # 0 on one device
    first_seconds: float  # of the first call, compiling included


def random_model(config: LlamaConfig, mesh: Mesh | None, drafter: str, dtype: str) -> LoadedModel:
    """Random weights, each made where it stays; norms are 1."""
    shapes = place_shapes(mesh, config, base_shapes(config))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        make = jax.jit(_random, static_argnames=("shape", "dtype", "ones"), out_shardings=leaf.sharding)
        made.append(make(key, shape=leaf.shape, dtype=dtype, ones=path[-1].key.endswith("norm")))
    exit_layer = 0 if issubclass(DRAFTERS[drafter], BlockDrafter) else max(1, config.num_layers // 4)
    manifest = Manifest(source="random", source_sha256="", dtype=dtype, exit_layer=exit_layer, drafter=drafter)
    definition, params = split(build_model(config, manifest, jax.tree.unflatten(tree, made), mesh=mesh), mesh)
    params = params._replace(drafter=spread(mesh, params.drafter), lora_s=spread(mesh, params.lora_s))
    return LoadedModel(config, manifest, definition, params)


def _random(key: jax.Array, shape: tuple[int, ...], dtype: str, ones: bool) -> jax.Array:
    if ones:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(0.02, dtype)


def begun_state(model: LoadedModel, batch: int, width: int) -> DecodeState:
    """Generations of which a prompt of zeros lies in the caches, without the prefill's compiling."""
    mesh = model.definition.mesh
    shapes = abstract_state(model, Sizes(batch, SLOTS, width, PROMPT))

    def zeros() -> DecodeState:
        state: DecodeState = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ones = jnp.ones_like(state.length)
        committed = state.committed.replace(start=ones * (PROMPT - 1), count=ones)
        return state.replace(length=ones * (PROMPT + 1), limit=ones * SLOTS, committed=committed)

    if mesh is None:
        return jax.jit(zeros)()
    specs = specs_for(STATE_SPECS, shapes)
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()


def round_ms(model: LoadedModel, plan: Plan, batch: int) -> tuple[float, float, int]:
    """Milliseconds of a round, seconds of the first call, and bytes that a device reads for one."""
    alike = rows_alike(batch * plan.rows, model.config, model.manifest.dtype)
    mesh, state = model.definition.mesh, begun_state(model, batch, plan.drafts + 1 if alike else plan.rows)
    caches = bytes_of(mesh, (state.shallow, state.deep), CACHES)
    nbytes = bytes_of(mesh, model.params.base) + caches * (PROMPT + ROUNDS // 2) // SLOTS
    params, knobs = model.decode_params, Knobs.make(plan.drafts, 0.0, (), until=ROUNDS)
    length = jnp.full_like(state.length, PROMPT + 1)
    load_kernels(model, state, knobs, plan)

    def run() -> None:
        nonlocal state
        # Lengths begin anew, so that all runs read as much of the caches.
        again = {"length": jnp.copy(length), "done": jnp.zeros_like(state.done), "rounds": jnp.zeros_like(state.rounds)}
        state = decode_rounds(model.definition, params, state.replace(**again), knobs, plan)
        jax.block_until_ready(state)

    seconds, first = _timed(run)
    return 1e3 * seconds / ROUNDS, first, nbytes


def update_ms(model: LoadedModel, rows: int, length: int) -> tuple[float, float]:
    """Milliseconds of a distillation's update on so many rows of random tokens, and seconds of the first."""
    config = DistillConfig(checkpoint="-", out="-", data=(), batch_rows=rows, row_length=length)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
    mask = rng.random(tokens.shape) < 0.7
    state = copied(model.definition.mesh, init_distill(model.params, config))

    def run() -> None:
        nonlocal state
        state, values = distill_step(model.definition, model.params, state, tokens, mask, config=config)
        jax.block_until_ready((state, values))

    seconds, first = _timed(run)
    return 1e3 * seconds, first


def exchange_us(mesh: Mesh | None, rows: int, size: int) -> float:
    """Microseconds in which devices get each other's parts of `rows` sums of `size`, as between two products."""
    if mesh is None or mesh.shape[MODEL] == 1:
        return 0.0

    def a_pass(number: jax.Array, x: jax.Array) -> jax.Array:
        del number
        inbox = exchange.inbox_for(1, rows, size)
        for _ in range(EXCHANGES):
            whole, inbox = exchange.joined_parts(x[None], inbox=inbox)
            x = 0.5 * jnp.sum(whole, axis=0)
        return x

    run = jax.jit(run_sharded(mesh, lambda x: jax.lax.fori_loop(0, PASSES, a_pass, x), (WHOLE,), WHOLE))
    x = copied(mesh, jnp.ones((rows, size), jnp.float32))
    seconds, _ = _timed(lambda: jax.block_until_ready(run(x)))
    return 1e6 * seconds / (PASSES * EXCHANGES)


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of five runs, and those of one before."""
    times = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:])), times[0]


def measure(shape: str, mesh_shape: MeshConfig, options: argparse.Namespace) -> list[Row]:
    """The rows of one shape on one mesh."""
    config, mesh = SHAPES[shape], make_mesh(mesh_shape)
    is_cpu = jax.default_backend() == "cpu"
    rate = copy_bandwidth(0.05 if is_cpu else 4.0)
    model = random_model(config, mesh, options.drafter, "float32" if is_cpu else "bfloat16")
    rows = []
    for what in options.what:
        for batch in options.batch:
            if what == DISTILL:
                ms, first = update_ms(model, options.rows, options.length)
                row = Row(shape, str(mesh_shape), what, options.rows, ms, 0, 0, 0, rate / 1e9, 0, first)
                row = Row(**asdict(row) | {"tokens_per_second": 1e3 * options.rows * options.length / ms})
            else:
                plan = Plan.parse(what)
                ms, first, nbytes = round_ms(model, plan, batch)
                us = exchange_us(mesh, batch * plan.rows // mesh_shape.data, config.hidden_size)
                floor = 1e3 * nbytes / rate + 1e-3 * us * (2 * config.num_layers + 2)
                row = Row(
                    shape, str(mesh_shape), what, batch, ms, 1e3 * batch / ms, floor, nbytes, rate / 1e9, us, first
                )
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    """One row for people."""
    return (
        f"{row.shape:8} {row.mesh:15} {row.what:10} batch {row.batch:3} {row.ms:9.3f} ms  floor {row.floor_ms:7.3f}"
        f"  {row.tokens_per_second:9.0f} tokens/s  exchange {row.exchange_us:5.1f} us  first {row.first_seconds:.0f} s"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: milliseconds over meshes, floors as marks, one panel for each shape and kind of work."""
    rows = result["rows"]
    panels = list(dict.fromkeys((row["shape"], row["what"], row["batch"]) for row in rows))
    figure = new_figure(3.2 * len(panels), 3.2)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = [row for row in rows if (row["shape"], row["what"], row["batch"]) == panel]
        names = [row["mesh"].replace(",", "\n") for row in own]
        axes.bar(names, [row["ms"] for row in own], color=BLUE, width=0.6)
        floors = [(name, row["floor_ms"]) for name, row in zip(names, own, strict=True) if row["floor_ms"]]
        axes.scatter([name for name, _ in floors], [floor for _, floor in floors], marker="_", s=400, color=GREY)
        axes.set_title(f"{panel[0]}, {panel[1]}, batch {panel[2]} (ms)", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    facts = result["environment"]
    figure.suptitle(f"{facts['device']}, jax {facts['jax']}", fontsize=10)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line as each comes, and write what was asked for."""
    options = _parser().parse_args(arguments)
    unknown = [shape for shape in options.shape if shape not in SHAPES]
    if unknown:
        raise UserError(f"--shape {unknown[0]}: known are {', '.join(SHAPES)}")
    if options.exchange != "peer":
        peer_memory.is_available = lambda: False
    meshes = [MeshConfig.parse(text) for text in options.mesh]
    rows = [asdict(row) for shape in options.shape for mesh in meshes for row in measure(shape, mesh, options)]
    result = {"environment": environment(), "settings": settings_of(options), "rows": rows}
    if options.out:
        write_result(Path(options.out), result)
        draw(result, Path(options.out).with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.scaling", description="Times over meshes of devices.")
    parser.add_argument("--shape", nargs="+", default=["7b"], metavar="NAME", help="presets")
    parser.add_argument("--mesh", nargs="+", default=["data=1,model=1"], metavar="MESH", help="such as model=2")
    parser.add_argument("--what", nargs="+", default=["plain"], metavar="PLAN", help=f"rounds of a plan, or {DISTILL}")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="sequences at once")
    parser.add_argument("--drafter", choices=sorted(DRAFTERS), default="exit_head", help="of the plans")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="of an update")
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N", help="tokens of a row")
    parser.add_argument(
        "--exchange", choices=["peer", "nccl"], default="peer", help="nccl: not through peer memory, where that serves"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write the rows, and a picture beside them")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
