"""Plain decoding and speculative rounds against the byte floor, compile times, and pictures of both.

    python -m experiments.speed suite --out speed.json                  everything: 1B, 7B, 13B shapes and SmolLM2's
    python -m experiments.speed suite --only 7b 7b-drafts --out a.json  some parts
    python -m experiments.speed suite --only smollm2 --checkpoint CKPT --drafter-from DIR --out b.json
    python -m experiments.speed one --shape 7b --draft-steps 5 --batch 4     one program
    python -m experiments.speed compile --shape 7b smollm2 --out c.json
    python -m experiments.speed plot a.json b.json c.json --out speed.png

The floor of a round is the time to read its bytes at the measured copy bandwidth: weights once for each pass over them,
keys and values of the mean context once for every row of the batch. Rounds are timed from a filled cache, without a
prefill: what it holds does not change the time of a round, but accept lengths, and so tokens per second of speculative
rows, mean nothing here. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dvi_jax.decode.memory import Sizes, lower_programs
from dvi_jax.decode.plan import Plan
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from dvi_jax.presets import SHAPES
from experiments.measure import abstract_model, copy_bandwidth, environment, random_model, settings_of, write_result
from experiments.speed_suite import PARTS, Case, findings, measure, suite

COLUMNS = {
    "shape": "{}",
    "batch": "{}",
    "context": "{:.0f}",
    "width": "{}",
    "plan": "{}",
    "round_ms": "{:.3f}",
    "spread": "{:.1%}",
    "floor_ms": "{:.3f}",
    "floor_fraction": "{:.3f}",
    "tokens_per_second": "{:.0f}",
    "compile_seconds": "{:.1f}",
}


def main() -> int:
    """Dispatch to the subcommand."""
    parser = ArgumentParser(prog="python -m experiments.speed", description=__doc__)
    commands = parser.add_subparsers(required=True, parser_class=ArgumentParser)
    _add_suite(commands.add_parser("suite", help="measure rounds"))
    _add_one(commands.add_parser("one", help="measure plain and speculative rounds of one program"))
    _add_compile(commands.add_parser("compile", help="measure compile times, cold and warm"))
    plot = commands.add_parser("plot", help="merge results and draw them")
    plot.add_argument("files", nargs="+", type=Path)
    plot.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    plot.set_defaults(run=run_plot)
    options = parser.parse_args()
    return options.run(options)


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the suite")
    _add_model_options(parser)
    parser.set_defaults(run=lambda options: run_cases(options, [c for c in suite() if c.part in options.only]))


def _add_one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--draft-steps", type=int, default=5)
    parser.add_argument(
        "--plans", nargs="+", default=[], metavar="PLAN", help="in place of it, such as chain:3 tree:16"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=256, help="length of the caches")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="tokens in the cache at the start")
    parser.add_argument("--new-tokens", type=int, default=64)
    _add_model_options(parser)
    parser.set_defaults(run=lambda options: run_cases(options, [_one_case(options)]))


def _one_case(options: argparse.Namespace) -> Case:
    plans = tuple(Plan.parse(text) for text in ("plain", *options.plans)) if options.plans else ()
    drafts = tuple(sorted({0, options.draft_steps}))
    return Case(
        "one",
        options.shape,
        width=max((plan.drafts for plan in plans), default=options.draft_steps) + 1,
        drafts=drafts,
        batch=options.batch,
        slots=options.slots,
        prompts=tuple(options.prompt),
        new_tokens=options.new_tokens,
        plans=plans,
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", help="real weights for the shape smollm2")
    parser.add_argument("--drafter-from", metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--drafter", default="exit_head", help="of random weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["7b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--draft-steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the child process of one reading
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.set_defaults(run=run_compile)


def run_cases(options: argparse.Namespace, cases: list[Case]) -> int:
    """Measure the cases, a line for every row as it comes and a table at the end."""
    enable_compilation_cache()
    minutes = sum(case.seconds() for case in cases) / 60
    print(
        f"{len(cases)} programs, {sum(c.rows for c in cases)} rows, about {minutes:.1f} minutes on an H100", flush=True
    )
    bandwidth = copy_bandwidth(4.0 if jax.default_backend() == "gpu" else 0.4)
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options), "rows": []}
    began, made = time.perf_counter(), ""
    model: LoadedModel | None = None
    for case in cases:
        if model is None or made != case.shape:
            model = None  # the old one goes before the new one comes
            gc.collect()
            model, made = make_model(case, options), case.shape
        for row in measure(model, case, options.repeats, bandwidth):
            result["rows"].append(row)
            line = " ".join(f"{name}={form.format(row[name])}" for name, form in COLUMNS.items())
            print(f"{time.perf_counter() - began:6.1f} s {case.part}: {line}", flush=True)
            if options.out:
                write_result(options.out, result)
    show(result)
    return 0


def make_model(case: Case, options: argparse.Namespace) -> LoadedModel:
    """The case's shape with random weights, or the checkpoint where one was given for it."""
    if case.shape == "smollm2" and options.checkpoint:
        return load(options.checkpoint, drafter_from=options.drafter_from)
    return random_model(SHAPES[case.shape], options.dtype, options.exit_layer, options.drafter)


def run_compile(options: argparse.Namespace) -> int:
    """Compile the programs of a first answer in fresh processes: with an empty cache on disk, then with that cache."""
    if options.inside:
        print(json.dumps(compile_here(options.shape[0], options)))
        return 0
    rows = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as cache:
            for name in ("cold", "warm"):
                row = {"shape": shape, "cache": name} | compile_in_child(shape, options, cache)
                rows.append(row)
                print(json.dumps(row), flush=True)
                head = {"environment": row["environment"], "settings": settings_of(options)}
                if options.out:
                    write_result(options.out, head | {"compile": rows})
    return 0


def compile_in_child(shape: str, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """One reading, by a new process whose compilation cache is `cache`."""
    command = [sys.executable, "-m", "experiments.speed", "compile", "--inside", "--shape", shape]
    for name in ("dtype", "exit_layer", "draft_steps", "batch", "prompt", "slots"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # This process keeps off the device, and the child takes no more memory than compiling needs.
    variables = os.environ | {"DVI_JAX_CACHE": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.perf_counter()
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"compiling {shape} in its own process ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - began}


def compile_here(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to trace and to compile prefill and decoding, from shapes alone: no weight is made."""
    enable_compilation_cache()
    facts = environment()  # also starts the device, which belongs to no compilation
    model = abstract_model(SHAPES[shape], options.dtype, options.exit_layer)
    began = time.perf_counter()
    lowered = lower_programs(model, Sizes(options.batch, options.slots, options.draft_steps + 1, options.prompt))
    seconds = {"trace_seconds": time.perf_counter() - began}
    for name, program in zip(("prefill", "decode"), lowered, strict=True):
        began = time.perf_counter()
        program.compile()
        seconds[f"{name}_seconds"] = time.perf_counter() - began
    return seconds | {"total_seconds": sum(seconds.values()), "environment": facts}


def run_plot(options: argparse.Namespace) -> int:
    """Merge the rows of several results into one table, one list of findings and one picture."""
    from experiments.speed_plots import draw

    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    merged = {"environment": results[0]["environment"]}
    for key in ("rows", "compile"):
        merged[key] = [row for result in results for row in result.get(key, [])]
    show(merged)
    draw(merged, options.out)
    print(f"wrote {options.out}")
    return 0


def show(result: dict[str, Any]) -> None:
    """The rows as a table and what they say."""
    facts, rows = result["environment"], result["rows"]
    table = Table(title=f"{facts['device']}, jax {facts['jax']}")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in COLUMNS.items()))
    Console(width=140).print(table)
    for name, value in findings(rows).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
