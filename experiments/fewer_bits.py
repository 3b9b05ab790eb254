"""Weights in fewer bits: milliseconds a token and a round for every format, beside the time to read their bytes.

    python -m experiments.fewer_bits --shape 7b --out fewer_bits.json
    python -m experiments.fewer_bits --shape 70b --formats int4 --batches 1 --plans
    python -m experiments.fewer_bits --formats bfloat16 --kv dtype int8 float8 --prompt 16320 --batches 4 8 --plans

Random weights of a published shape, made on the device as they are kept. Plain decoding with so many sequences of one
row (`--batches`) and a round of each plan with an untrained drafter, from a filled cache; medians after a first call
that is not counted. The floor is the format's bytes over the bandwidth of a copy in the same process. Programs of all
formats are compiled side by side, before anything is measured. `--kv`: the same for what keys and values are kept in;
sequences whose caches don't fit beside the weights are a row without times.
"""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from dvi_jax.config import KV, WHOLE_KV
from dvi_jax.decode.memory import Sizes, abstract_state, available_bytes, tree_bytes
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache
from dvi_jax.presets import SHAPES
from dvi_jax.quantisation import BFLOAT16, GROUPS, WEIGHTS, chosen_storage
from experiments.measure import (
    abstract_model,
    copy_bandwidth,
    environment,
    filled_state,
    floor_of,
    random_model,
    settings_of,
    time_decode,
    write_result,
)

COLUMNS = {
    "weights": "{}",
    "kv": "{}",
    "plan": "{}",
    "batch": "{}",
    "round_ms": "{:.3f}",
    "floor_ms": "{:.3f}",
    "floor_fraction": "{:.2f}",
    "against_bfloat16": "{:.2f}",
    "weight_gb": "{:.2f}",
    "state_gb": "{:.2f}",
}


class Case(NamedTuple):
    """What is measured."""

    weights: str  # what matrices are kept in
    kv: str  # and keys and values
    plan: Plan
    batch: int  # sequences


def main() -> int:
    """Compile, measure, and print a table."""
    parser = ArgumentParser(prog="python -m experiments.fewer_bits", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--formats", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--group", type=int, choices=GROUPS, default=64)
    parser.add_argument("--quantise-head", action="store_true", help="the LM head too")
    parser.add_argument("--kv", nargs="+", choices=KV, default=[WHOLE_KV], help="what keys and values are kept in")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="sequences decoded plainly")
    parser.add_argument("--plans", nargs="*", default=["chain:3"], help="of one sequence's rounds")
    parser.add_argument("--drafter", default="fused")
    parser.add_argument("--exit-layer", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of all that is no matrix")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache at the start")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    enable_compilation_cache()
    began = time.perf_counter()
    cases = [
        Case(weights, kv, plan, batch)
        for weights in options.formats
        for kv in options.kv
        for plan, batch in [(PLAIN, b) for b in options.batches] + [(Plan.parse(text), 1) for text in options.plans]
    ]
    programs = compile_all(cases, options)
    print(f"{len(cases)} programs in {time.perf_counter() - began:.1f} s", flush=True)
    bandwidth = copy_bandwidth(4.0 if jax.default_backend() == "gpu" else 0.1)
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options)}
    result |= {"copy_gb_per_s": bandwidth / 1e9, "rows": []}
    for weights in options.formats:
        gc.collect()  # one model at a time
        model = make(weights, options)
        for case in (case for case in cases if case.weights == weights):
            result["rows"].append(measured(model.with_kv(case.kv), case, programs[case].result(), bandwidth, options))
            add_ratio(result["rows"])
            print(line(result["rows"][-1]), flush=True)
            if options.out:
                write_result(options.out, result)
        del model
    show(result)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def make(weights: str, options: Any, *, abstract: bool = False) -> LoadedModel:
    """The model in one format, or its shapes."""
    dtype, how = chosen_storage(weights, None, group=options.group, head=options.quantise_head)
    kind = options.dtype if weights != BFLOAT16 else dtype or BFLOAT16
    maker = abstract_model if abstract else random_model
    return maker(SHAPES[options.shape], kind, options.exit_layer, options.drafter, how)


def compile_all(cases: list[Case], options: Any) -> dict[Case, Future[jax.stages.Compiled]]:
    """The decode loops of all cases, traced one after the other and compiled side by side."""
    programs = {}
    with ThreadPoolExecutor() as pool:
        for weights in options.formats:
            model = make(weights, options, abstract=True)
            params = jax.eval_shape(lambda p, model=model: model.with_params(p).decode_params, model.params)
            for case in (case for case in cases if case.weights == weights):
                keeping = model.with_kv(case.kv)
                state = abstract_state(keeping, sizes(case.plan, case.batch, options))
                knobs = jax.eval_shape(lambda: Knobs.make(0, 0.0, ()))
                lowered = decode_rounds.lower(keeping.definition, params, state, knobs, case.plan)
                programs[case] = pool.submit(lowered.compile)
    return programs


def sizes(plan: Plan, batch: int, options: Any) -> Sizes:
    """Of the states that a case decodes."""
    slots = -(-(options.prompt + options.new_tokens + plan.rows + 1) // 64) * 64
    return Sizes(batch, slots, plan.drafts + 1, prompt=16)


def measured(
    model: LoadedModel, case: Case, program: jax.stages.Compiled, bandwidth: float, options: Any
) -> dict[str, Any]:
    """One row of the table."""
    weights, kv, plan, batch = case
    size = sizes(plan, batch, options)
    state_bytes = tree_bytes(abstract_state(model, size))
    about = {"weights": weights, "kv": kv, "plan": str(plan), "batch": batch}
    about |= {"weight_gb": tree_bytes(model.params.base) / 1e9, "state_gb": state_bytes / 1e9}
    if state_bytes > available_bytes():
        return about | dict.fromkeys(("round_ms", "floor_ms", "floor_fraction"), float("nan"))
    fresh = partial(filled_state, model, batch, size.slots, size.width, options.prompt, new_tokens=options.new_tokens)
    timing = time_decode(program, model, fresh, plan.drafts, options.repeats)
    floor_bytes = floor_of(model, batch).bytes(timing.drafted_per_round, options.prompt + options.new_tokens / 2)
    return {
        **about,
        **vars(timing),
        "floor_ms": 1e3 * floor_bytes / bandwidth,
        "floor_fraction": 1e3 * floor_bytes / bandwidth / timing.round_ms,
    }


def add_ratio(rows: list[dict[str, Any]]) -> None:
    """To the last row: how many times bfloat16's speed at the same plan and batch it is, where that was measured."""
    row = rows[-1]
    wanted = {"weights": BFLOAT16, "kv": WHOLE_KV, "plan": row["plan"], "batch": row["batch"]}
    same = [r for r in rows if wanted.items() <= r.items()]
    row["against_bfloat16"] = same[0]["round_ms"] / row["round_ms"] if same else float("nan")


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return " ".join(f"{name}={form.format(row[name])}" for name, form in COLUMNS.items())


def show(result: dict[str, Any]) -> None:
    """The rows as a table."""
    facts = result["environment"]
    table = Table(title=f"{facts['device']}, jax {facts['jax']}, copy {result['copy_gb_per_s']:.0f} GB/s")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(*(form.format(row[name]) for name, form in COLUMNS.items()))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
