"""Tokens per round over training tokens: one-pass blocks, step by step, and step by step with inner features.

    python -m experiments.curves --config experiments/configs/losses.yaml --tokens 1000000 2000000 5000000 \\
        --questions question.jsonl --out FILE.json

All see the same rows in the same order. Every point is a run of its own whose learning rate falls to its end, not an
inner point of a longer one. The smallest budget comes first for all, so that a run that is cut off can still be
compared. Writes FILE.json after every point and a picture beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.config import LlamaConfig
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.style import CYCLE, new_figure, save_picture
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.model.drafters.inner import spread_taps
from experiments.measure import environment, write_result
from experiments.objectives import recorded
from experiments.side_by_side import add_arguments, open_bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, list[dict[str, Any]]]  # of each drafter, a record for each budget


def drafters(config: LlamaConfig, block: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and options of a drafter."""
    return {
        "fused": ("fused", {"taps": []}),
        "fused, inner features": ("fused", {"taps": list(spread_taps(config))}),
        "block": ("block", {"layers": 2, "block": block}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every drafter at every budget; results are on the disk after every point."""
    parser = ArgumentParser(prog="python -m experiments.curves", description=__doc__)
    add_arguments(parser, prompts=32)
    parser.add_argument("--tokens", nargs="+", type=at_least_one, required=True, help="budgets, smallest first")
    parser.add_argument("--drafters", nargs="+", metavar="NAME", help="some of them, by name (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    bench = open_bench(options)
    known = drafters(bench.checkpoint.config, options.draft_steps)
    chosen = options.drafters or list(known)
    if not set(chosen) <= set(known):
        raise UserError(f"--drafters takes {'; '.join(known)}, got {'; '.join(chosen)}")
    curves: Curves = {name: [] for name in chosen}
    result = {"environment": environment(), "settings": recorded(bench.config), "curves": curves}
    for tokens in sorted(options.tokens):
        for name in chosen:
            began = time.perf_counter()
            model = bench.train(*known[name], tokens, options.seed)
            agreement = bench.agreement(model)
            acceptance = bench.decode(model, options.draft_steps, options.new_tokens)
            record = {"tokens": tokens, "agreement": agreement, "tokens_per_round": acceptance.tokens_per_round}
            record |= {"per_position": acceptance.per_position, "seconds": time.perf_counter() - began}
            curves[name].append(record)
            write_result(options.out, result)
            print(f"{name}, {tokens} tokens: {acceptance.tokens_per_round:.3f} tokens per round", flush=True)
    draw(curves, options.out.with_suffix(".png"))
    return 0


def draw(curves: Curves, path: Path) -> None:
    """Tokens per round, and how often the first draft is right in held-out rows, over the tokens trained on."""
    save_picture(lambda: _panels(curves), path)


def _panels(curves: Curves) -> Figure:
    figure = new_figure(9, 3.8)
    panels = figure.subplots(1, 2)
    for color, (name, points) in zip(CYCLE, curves.items(), strict=False):
        millions = [point["tokens"] / 1e6 for point in points]
        panels[0].plot(millions, [point["tokens_per_round"] for point in points], "o-", color=color, label=name)
        panels[1].plot(millions, [100 * point["agreement"][0] for point in points], "o-", color=color)
    panels[0].set_ylabel("tokens per round")
    panels[1].set_ylabel("held-out rows: first draft right (%)")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks([point["tokens"] / 1e6 for point in next(iter(curves.values()))])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("tokens of training (millions)")
        axes.grid()
    figure.legend(loc="outside lower center", ncols=len(curves), frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(run_cli(main))
