"""Where the time of a round goes: kernels, launches, copies and gaps of plain and speculative rounds, from a trace.

    python -m experiments.profile_round --shape 7b --draft-steps 5 --out profile_7b.json

Decodes random weights from a filled cache, untraced and then under `jax.profiler`, and groups what the device did by
the part of the model it belongs to (read off the compiled program's metadata). `--graphs none` launches every kernel by
itself, so that library kernels carry their place in the program too; times of kernels stay comparable, gaps do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dvi_jax.decode.plan import plan_for
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from dvi_jax.presets import SHAPES
from experiments.measure import (
    compile_decode,
    copy_bandwidth,
    environment,
    filled_state,
    floor_of,
    random_model,
    settings_of,
    time_decode,
    write_result,
)
from experiments.trace_events import Instruction, Trace, instructions, newest_trace, read_trace

_GRAPH_FLAG = "--xla_gpu_enable_command_buffer="
_ALL_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
GRAPHS = {"default": "", "none": _GRAPH_FLAG, "all": _GRAPH_FLAG + _ALL_COMMANDS}


def main() -> int:
    """Profile plain and speculative rounds of one program; print the tables, write the JSON."""
    parser = ArgumentParser(prog="python -m experiments.profile_round", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES))
    source.add_argument("--checkpoint", metavar="CKPT")
    parser.add_argument("--drafter-from", metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--draft-steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--slots", type=int, default=256, help="length of the caches")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--graphs", choices=sorted(GRAPHS), default="default", help="what XLA puts into CUDA graphs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the raw traces here")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS[options.graphs]}".strip()
    enable_compilation_cache()
    if options.shape:
        model = random_model(SHAPES[options.shape], options.dtype, options.exit_layer)
    else:
        model = load(options.checkpoint, drafter_from=options.drafter_from)
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options), "profiles": []}
    bandwidth = copy_bandwidth(4.0 if jax.default_backend() == "gpu" else 0.4)
    for drafts in sorted({0, options.draft_steps}):
        profile = profile_rounds(model, options, drafts)
        drafted = profile["drafted_per_round"]  # the last rounds draft less, so as not to pass the limit
        floor = floor_of(model, options.batch).bytes(drafted, options.prompt + options.rounds / 2)
        profile["floor_ms"] = 1e3 * floor / bandwidth
        result["profiles"].append(profile)
        show(profile, result["environment"])
        if options.out:
            write_result(options.out, result)
    return 0


def profile_rounds(model: LoadedModel, options: argparse.Namespace, drafts: int) -> dict[str, Any]:
    """One profile: untraced milliseconds per round, and what the traced generation consisted of, per round."""
    width, new_tokens = options.draft_steps + 1, options.rounds + 1
    fresh = partial(filled_state, model, options.batch, options.slots, width, options.prompt, new_tokens)
    program, _ = compile_decode(model, fresh(), plan_for(drafts, drafts_blocks=model.drafts_blocks))
    timing = time_decode(program, model, fresh, drafts, repeats=3)
    state, knobs = jax.block_until_ready(fresh()), Knobs.make(drafts, 0.0, ())
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch, profiler_options=quiet_options()):
            jax.block_until_ready(program(model.decode_params, state, knobs))
        trace = read_trace(Path(scratch))
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(newest_trace(Path(scratch)), options.keep / f"drafts_{drafts}.xplane.pb")
    text = program.as_text()
    if text is None:
        raise UserError("this device's compiler does not show its programs")
    facts = {"drafts": drafts, "width": width} | vars(timing)
    return facts | summarise(trace, instructions(text), timing.rounds)


def quiet_options() -> jax.profiler.ProfileOptions:
    """Trace the device and the driver's calls, not Python."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2
    return options


def summarise(trace: Trace, program: dict[str, Instruction], rounds: int) -> dict[str, Any]:
    """Groups, kernels, copies, gaps and driver calls, each per round."""
    trace = trace.without_control(program)
    groups: dict[str, list[float]] = {}
    kernels: dict[tuple[str, str], list[float]] = {}
    for event in trace.device:
        group = event.group(program)
        groups.setdefault(group, []).append(event.duration_ns)
        kernels.setdefault((event.name, group), []).append(event.duration_ns)
    window, busy, gaps = trace.coverage()
    copies: dict[str, list[float]] = {}
    for event in trace.device:
        if event.is_copy:
            copies.setdefault(event.copy_label, []).append(event.duration_ns)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "traced_round_ms": 1e-6 * window / rounds,
        "busy_ms": 1e-6 * busy / rounds,
        "gap_ms": 1e-6 * (window - busy) / rounds,
        "gaps": len(gaps) / rounds,
        "longest_gap_us": 1e-3 * max(gaps, default=0.0),
        "groups": _per_round(groups, rounds),
        "copies": _per_round(copies, rounds),
        "kernels": [
            {"name": name, "group": group, "ms": 1e-6 * sum(times) / rounds, "count": len(times) / rounds}
            for (name, group), times in longest
        ],
        "driver_calls": {name: count / rounds for name, count in sorted(trace.driver_calls.items())},
        "lines": trace.lines,
    }


def _per_round(found: dict[str, list[float]], rounds: int) -> dict[str, dict[str, float]]:
    rows = {name: {"ms": 1e-6 * sum(t) / rounds, "count": len(t) / rounds} for name, t in found.items()}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))


def show(profile: dict[str, Any], facts: dict[str, str]) -> None:
    """The groups of one profile, and below them the copies, gaps and driver calls."""
    table = Table(
        title=f"{facts['device']}: {profile['drafts']} drafts, width {profile['width']},"
        f" {profile['round_ms']:.3f} ms per round untraced, floor {profile['floor_ms']:.3f},"
        f" {profile['traced_round_ms']:.3f} traced over {profile['rounds']} rounds"
    )
    for column in ("part", "ms / round", "of traced", "kernels / round"):
        table.add_column(column, justify="left" if column == "part" else "right")
    whole = profile["traced_round_ms"] or 1.0
    for name, row in profile["groups"].items():
        table.add_row(name, f"{row['ms']:.4f}", f"{row['ms'] / whole:.1%}", f"{row['count']:.1f}")
    gaps = f"{profile['gaps']:.1f}, longest {profile['longest_gap_us']:.0f} us"
    table.add_row("gaps between kernels", f"{profile['gap_ms']:.4f}", f"{profile['gap_ms'] / whole:.1%}", gaps)
    Console(width=140).print(table)
    for kernel in profile["kernels"][:12]:
        print(f"  {kernel['ms']:.4f} ms x{kernel['count']:.1f}  {kernel['name'][:70]}  in {kernel['group']}")
    for title in ("copies", "driver_calls"):
        print(f"{title} per round: {json.dumps(profile[title])}", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
