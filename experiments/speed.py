"""Plain decoding and speculative rounds against the byte floor, on random or real weights.

python -m experiments.speed --shape 7b --draft-steps 0 3 5
python -m experiments.speed --checkpoint CKPT --draft-steps 0 3 5
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.load import enable_compilation_cache, load
from dvi_jax.presets import SHAPES
from experiments.measure import copy_bandwidth, environment, floor_of, random_model, settings_of, time_decode


def main() -> int:
    """Measure, print one table, write one JSON file."""
    parser = ArgumentParser(prog="python -m experiments.speed", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(SHAPES))
    source.add_argument("--checkpoint", metavar="CKPT")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[0, 1, 3, 5, 7])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="prompt lengths")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    enable_compilation_cache()
    bandwidth = copy_bandwidth(4.0 if jax.default_backend() == "gpu" else 0.4)
    if options.shape:
        model = random_model(SHAPES[options.shape], options.dtype, options.exit_layer)
    else:
        model = load(options.checkpoint)
    rows = []
    rng = np.random.default_rng(0)
    for batch in options.batch:
        for length in options.prompt:
            prompts = rng.integers(3, model.config.vocab_size, (batch, length)).tolist()
            for steps in options.draft_steps:
                rows += measure(model, prompts, steps, options.new_tokens, options.repeats, bandwidth)
    result = {
        "environment": environment(),
        "copy_gb_per_s": bandwidth / 1e9,
        "settings": settings_of(options),
        "rows": rows,
    }
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


def measure(model, prompts: list[list[int]], steps: int, new_tokens: int, repeats: int, bandwidth: float) -> list[dict]:  # noqa: ANN001
    """Plain decoding at width steps + 1, and speculative rounds where steps > 0."""
    settings, floor = DecodeConfig(steps, 0.0, new_tokens), floor_of(model, len(prompts))
    context, rows = len(prompts[0]) + new_tokens / 2, []
    for plain in (True, False) if steps else (True,):
        timing = time_decode(model, prompts, settings, plain=plain, repeats=repeats)
        floor_ms = 1e3 * floor.bytes(0 if plain else steps, context) / bandwidth
        rows.append(
            {
                "mode": "plain" if plain else "speculative",
                "batch": len(prompts),
                "prompt": len(prompts[0]),
                "width": steps + 1,
                "round_ms": timing.round_ms,
                "floor_ms": floor_ms,
                "floor_fraction": floor_ms / timing.round_ms,
                "tokens_per_second": timing.tokens_per_second,
                "tokens_per_round": timing.tokens_per_round,
                "compile_seconds": timing.compile_seconds,
            }
        )
    return rows


def show(result: dict) -> None:
    """The rows as a table."""
    facts = result["environment"]
    table = Table(title=f"{facts['device']}, jax {facts['jax']}, copy {result['copy_gb_per_s']:.0f} GB/s")
    for column in ("mode", "batch", "prompt", "width", "ms / round", "floor ms", "of floor", "tokens/s", "compile s"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["mode"],
            str(row["batch"]),
            str(row["prompt"]),
            str(row["width"]),
            f"{row['round_ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['floor_fraction']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
