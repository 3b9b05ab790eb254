"""What rows of a verifying pass cost: milliseconds of rounds whose drafts are there already, beside their bytes.

    python -m experiments.verifying_rows --shape 7b --passes 1x1 16x1 64x1 8x8 --out FILE.json
    python -m experiments.verifying_rows --shape smollm2 --prompt 128 --passes 1x1 16x1

WxB: W rows of each of B sequences, the pending token and W - 1 given drafts, all of which go through the whole model.
Whatever the drafts are, a round commits what plain decoding would; nothing is drafted in it. Random weights; medians
after a first call that is not counted, the passes taking turns. The floor is the weights and the context's keys and
values over the bandwidth of a copy in the same process. Programs are compiled side by side, before anything is timed.
"""

from __future__ import annotations

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dvi_jax.decode.commit import accept, commit
from dvi_jax.decode.drafting import Draft, pending_token
from dvi_jax.decode.memory import Sizes, abstract_state
from dvi_jax.decode.plan import MOST_TREE_ROWS
from dvi_jax.decode.speculative import verify
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join
from dvi_jax.presets import SHAPES
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
from experiments.row_classes import parse_pass

EXIT_LAYER = 1  # of the drafter that the model must have, and which drafts nothing here


class Pass(NamedTuple):
    """What is measured."""

    width: int  # W
    batch: int  # B

    def sizes(self, options: Any) -> Sizes:
        """Of the states that are decoded: caches for what is there and what comes, and the rows of the last round."""
        slots = -(-(options.prompt + options.new_tokens + self.width + 1) // 64) * 64
        return Sizes(self.batch, slots, self.width, prompt=16)


def main() -> int:
    """Compile, measure, and print a table."""
    parser = ArgumentParser(prog="python -m experiments.verifying_rows", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--passes", nargs="+", default=["1x1", "4x1", "4x4"], metavar="WxB")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the caches at the start")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    passes = [Pass(*parse_pass(text, MOST_TREE_ROWS)) for text in options.passes]
    enable_compilation_cache()
    programs = compile_all(passes, options)
    model = random_model(SHAPES[options.shape], options.dtype, EXIT_LAYER)
    bandwidth = copy_bandwidth(4.0 if jax.default_backend() == "gpu" else 0.1)
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(options.repeats):
        for seconds, program, of in zip(times, programs, passes, strict=True):
            fresh = partial(began, model, of, options)
            seconds.append(time_decode(program, model, fresh, of.width - 1, 1).round_ms)
    rows = []
    for of, found in zip(passes, times, strict=True):
        floor = floor_of(model, of.batch).bytes(0, options.prompt + options.new_tokens / 2) / bandwidth
        middle = statistics.median(found)
        rows.append({"pass": f"{of.width}x{of.batch}", "round_ms": middle, "floor_ms": 1e3 * floor})
        rows[-1] |= {"floor_fraction": 1e3 * floor / middle, "spread": (max(found) - min(found)) / middle}
    result = {"environment": environment(), "settings": settings_of(options), "copy_gb_per_s": bandwidth / 1e9}
    if options.out:
        write_result(options.out, result | {"rows": rows})
    show(rows, options.shape, bandwidth)
    return 0


def compile_all(passes: list[Pass], options: Any) -> list[jax.stages.Compiled]:
    """The rounds of each pass, traced one after the other and compiled side by side."""
    model = abstract_model(SHAPES[options.shape], options.dtype, EXIT_LAYER)
    params = jax.eval_shape(lambda p: model.with_params(p).decode_params, model.params)
    knobs = jax.eval_shape(lambda: Knobs.make(0, 0.0, ()))
    with ThreadPoolExecutor() as pool:
        lowered = []
        for of in passes:
            state = abstract_state(model, of.sizes(options))
            program = jax.jit(partial(rounds, model.definition), donate_argnums=1)
            lowered.append(pool.submit(program.lower(params, state, knobs).compile))
        return [program.result() for program in lowered]


def began(model: LoadedModel, of: Pass, options: Any) -> DecodeState:
    """Sequences in the middle, with room for what is decoded."""
    size = of.sizes(options)
    return filled_state(model, of.batch, size.slots, size.width, options.prompt, new_tokens=options.new_tokens)


def rounds(definition: Definition, params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
    """Rounds of given drafts until every sequence is at its limit."""
    model = join(definition, params)
    return jax.lax.while_loop(lambda s: ~jnp.all(s.done), lambda s: verifying_round(model, s, knobs), state)


def verifying_round(model: SpeculativeLlama, state: DecodeState, knobs: Knobs) -> DecodeState:
    """A round of all rows that the state has room for, whose drafts follow the pending token in the vocabulary."""
    width, vocabulary = state.committed.hidden.shape[1], model.llama.config.vocab_size
    tokens = (pending_token(state) + jnp.arange(width)) % vocabulary
    # As many as may be committed: the verifier's own token is one of those.
    count = jnp.where(state.done, 0, jnp.minimum(width - 1, state.limit - state.length - 1))
    idle = jnp.zeros_like(state.done)
    draft = Draft(tokens, count, idle, jnp.ones_like(count, jnp.float32), None)
    verified, hidden, features, state = verify(model, state, draft)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    verdict = accept(verified, following, count, knobs.eos_ids)
    return commit(state, count, verified, hidden, features, verdict, None)


def show(rows: list[dict[str, Any]], shape: str, bandwidth: float) -> None:
    """The table, against the first pass."""
    table = Table("rows x sequences", "ms a round", "against the first", "floor, ms", "of the floor", title=shape)
    for row in rows:
        ratio = row["round_ms"] / rows[0]["round_ms"]
        cells = f"{row['round_ms']:.3f}", f"{ratio:.3f}", f"{row['floor_ms']:.3f}", f"{row['floor_fraction']:.3f}"
        table.add_row(row["pass"], *cells)
    Console().print(table)
    print(f"copy {bandwidth / 1e9:.0f} GB/s")


if __name__ == "__main__":
    sys.exit(run_cli(main))
