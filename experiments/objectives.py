"""Objectives compared online at equal prompts: KL only, RL only, cross-entropy only, KL -> RL; several seeds.

    python -m experiments.objectives --config experiments/configs/objectives.yaml --seeds 3 --out DIR

Every run starts from the untrained drafter of the checkpoint; the stream is the same, the seed draws the drafter's
first weights, the replay samples and the positions. Writes DIR/objectives.json and DIR/objectives.png.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvi_jax.config import ObjectiveConfig, TrainConfig, load_train_config
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.evaluate.plots import new_figure
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.online import train
from dvi_jax.load import enable_compilation_cache
from experiments.measure import environment


def variants(base: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The compared objectives; `base` is the KL -> RL one."""
    return {
        "KL only": replace(base, kl_min=base.kl_max, pg_max=0.0, ce_weight=0.0),
        "RL only": replace(base, kl_max=0.0, kl_min=0.0, warmup=0, ramp=1, ce_weight=0.0),
        "CE only": replace(base, kl_max=0.0, kl_min=0.0, pg_max=0.0, ce_weight=1.0),
        "KL -> RL": base,
    }


def main() -> int:
    """Run the grid and write its results."""
    parser = ArgumentParser(prog="python -m experiments.objectives", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    config = load_train_config(options.config, options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {
        name: [run(replace(config, objective=objective, seed=seed)) for seed in range(options.seeds)]
        for name, objective in variants(config.objective).items()
    }
    result = {"environment": environment(), "config": options.config, "set": options.set, "runs": runs}
    (options.out / "objectives.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, options.out / "objectives.png")
    for name, seeds in runs.items():
        print(f"{name:10s} accept rate {spread([seed['accept_rate'][-1] for seed in seeds])}")
    return 0


def run(config: TrainConfig) -> dict[str, Any]:
    """One training run in a scratch directory; its held-out curve."""
    with tempfile.TemporaryDirectory() as scratch:
        result = train(replace(config, out=f"{scratch}/run"))
        evaluations = MetricsLog(Path(scratch) / "run" / "metrics.jsonl").records("eval")
    return {
        "updates": [record["step"] for record in evaluations],
        "accept_rate": [record["accept_rate"] for record in evaluations],
        "tokens_per_round": [record["tokens_per_round"] for record in evaluations],
        "new_tokens": result.progress.new_tokens,
        "seconds": result.progress.seconds,
    }


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}, {len(values)} seeds)"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out accept rate over updates: mean line, band from the lowest to the highest seed."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, seeds in runs.items():
        curves = [[100 * rate for rate in seed["accept_rate"]] for seed in seeds]
        updates = seeds[0]["updates"]
        (line,) = axes.plot(updates, [statistics.mean(point) for point in zip(*curves, strict=True)], label=name)
        low, high = [min(p) for p in zip(*curves, strict=True)], [max(p) for p in zip(*curves, strict=True)]
        axes.fill_between(updates, low, high, color=line.get_color(), alpha=0.2)
    axes.set_xlabel("fast updates")
    axes.set_ylabel("held-out accept rate (%)")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_cli(main))
