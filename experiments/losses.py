"""Losses of a distillation compared at equal tokens: what decides how far a drafter comes with the same text.

    python -m experiments.losses --config experiments/configs/losses.yaml --seeds 3 --questions question.jsonl \\
        --out FILE.json

KL and total variation take the verifier's whole distribution (soft), cross-entropy its first choice alone (hard);
later drafts weigh less in all but one. A seed draws the first weights and the order of the rows, the same for every
loss. Each drafter then decodes the questions. Writes FILE.json after every run and a picture beside it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.config import DistillLoss
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.style import BLUE, new_figure, save_picture
from dvi_jax.loading import enable_compilation_cache
from experiments.measure import environment, write_result
from experiments.objectives import recorded
from experiments.side_by_side import add_arguments, open_bench, range_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name -> settings of a run.
LOSSES: dict[str, dict[str, Any]] = {
    "KL": {"loss": DistillLoss()},
    "total variation": {"loss": DistillLoss(kl=0.0, tv=1.0)},
    "cross-entropy": {"loss": DistillLoss(kl=0.0, ce=1.0)},
    "0.9 total variation + 0.1 cross-entropy": {"loss": DistillLoss(kl=0.0, tv=0.9, ce=0.1)},
    "KL, all drafts alike": {"loss": DistillLoss(), "unroll_decay": 1.0},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every loss with every seed; results are on the disk after every run."""
    parser = ArgumentParser(prog="python -m experiments.losses", description=__doc__)
    add_arguments(parser, prompts=32)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), help="some of them, by name")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.losses if name not in LOSSES]
    if unknown:
        raise UserError(f"unknown losses {', '.join(unknown)}; known: {'; '.join(LOSSES)}")
    enable_compilation_cache()
    bench = open_bench(options)
    config = bench.config
    losses: dict[str, list[dict[str, Any]]] = {name: [] for name in options.losses}
    result = {"environment": environment(), "settings": recorded(config), "losses": losses}
    for seed in range(options.seeds):
        for name in options.losses:
            began = time.perf_counter()
            model = bench.train(config.drafter, config.drafter_options, config.tokens, seed, **LOSSES[name])
            agreement = bench.agreement(model)
            acceptance = bench.decode(model, options.draft_steps, options.new_tokens)
            record = {"agreement": agreement, "tokens_per_round": acceptance.tokens_per_round}
            losses[name].append(record | {"seconds": time.perf_counter() - began})
            write_result(options.out, result)
            print(f"{name}, seed {seed}: {acceptance.tokens_per_round:.3f} tokens per round", flush=True)
    draw(losses, options.out.with_suffix(".png"))
    for name, runs in losses.items():
        first = [100 * run["agreement"][0] for run in runs]
        rounds = [run["tokens_per_round"] for run in runs]
        print(f"{name:40s} first draft {range_of(first, 1)}%, tokens per round {range_of(rounds, 3)}")
    return 0


def draw(losses: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out agreement of the first draft, and tokens per round: a dot for each seed, a bar for their mean."""
    save_picture(lambda: _panels(losses), path)


def _panels(losses: dict[str, list[dict[str, Any]]]) -> Figure:
    figure = new_figure(9, 0.9 + 0.45 * len(losses))
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(losses))
    for axes, label, least, values in (
        (panels[0], "held-out rows: first draft right (%)", 0, lambda run: 100 * run["agreement"][0]),
        (panels[1], "tokens per round", 1, lambda run: run["tokens_per_round"]),
    ):
        seeds = [[values(run) for run in runs] for runs in losses.values()]
        means = [statistics.mean(found) for found in seeds]
        axes.barh(places, means, color=BLUE, alpha=0.35)
        for place, found in zip(places, seeds, strict=True):
            axes.plot(found, [place] * len(found), "o", color=BLUE, markersize=4)
        axes.set_xlim(least, least + 1.05 * (max(map(max, seeds)) - least))  # what a drafter that is never right has
        axes.set_xlabel(label)
    panels[0].set_yticks(places, list(losses))
    panels[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    sys.exit(run_cli(main))
