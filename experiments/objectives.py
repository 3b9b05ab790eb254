"""Objectives compared online at equal prompts: KL only, RL only, cross-entropy only, KL -> RL; several seeds.

    python -m experiments.objectives --config experiments/configs/objectives.yaml --seeds 3 --out DIR

Every run starts from the untrained drafter of the checkpoint; the stream is the same, the seed draws the drafter's
first weights, the replay samples and the positions. Decoding is lossless, so every run sees the same tokens whatever
its drafter does. Writes DIR/objectives.json after every run, and DIR/objectives.png.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.config import DistillConfig, ObjectiveConfig, TrainConfig, load_train_config
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.style import CYCLE, GREY, new_figure, save_picture
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.online import train_online
from dvi_jax.loading import enable_compilation_cache
from experiments.measure import environment, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def variants(base: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The compared objectives; `base` is the KL -> RL one."""
    return {
        "KL only": replace(base, kl_min=base.kl_max, pg_max=0.0, ce_weight=0.0),
        "RL only": replace(base, kl_max=0.0, kl_min=0.0, warmup=0, ramp=1, ce_weight=0.0),
        "CE only": replace(base, kl_max=0.0, kl_min=0.0, pg_max=0.0, ce_weight=1.0),
        "KL -> RL": base,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid, seed by seed; results are on the disk after every run."""
    parser = ArgumentParser(prog="python -m experiments.objectives", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    config = online_config(options.config, options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants(config.objective)}
    result = {"environment": environment(), "settings": recorded(config), "runs": runs}
    for seed in range(options.seeds):
        for name, objective in variants(config.objective).items():
            record = run(replace(config, objective=objective, seed=seed))
            runs[name].append(record)
            write_result(options.out / "objectives.json", result)
            last, seconds = record["accept_rate"][-1], record["seconds"]
            print(f"{name}, seed {seed}: accept rate {last:.1%}, {seconds:.0f} s", flush=True)
    draw(result, options.out / "objectives.png")
    for name, seeds in runs.items():
        print(f"{name:10s} accept rate {spread([seed['accept_rate'][-1] for seed in seeds])}")
    return 0


def online_config(path: str | Path, overrides: Sequence[str]) -> TrainConfig:
    """An online run's settings; `UserError` for another trainer's."""
    config = load_train_config(path, overrides)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} must hold the settings of an online run, without trainer: distill")
    return config


def recorded(config: TrainConfig | DistillConfig) -> dict[str, Any]:
    """Every setting of a run, for its result: names of files and folders without where they lay on this machine."""

    def names_only(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: names_only(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [names_only(inner) for inner in value]
        return Path(value).name if isinstance(value, str) else value

    settings = asdict(config)
    del settings["out"]
    return names_only(settings)


def run(config: TrainConfig) -> dict[str, Any]:
    """One training run in a scratch directory; its held-out curve over the prompts learned from."""
    with tempfile.TemporaryDirectory() as scratch:
        result = train_online(replace(config, out=f"{scratch}/run"))
        metrics = MetricsLog(Path(scratch) / "run" / "metrics.jsonl")
        evaluations, rollbacks = metrics.records("eval"), metrics.records("rollback")
    prompts_per_update = config.rollout_batch * config.update_every / max(config.updates_per_rollout, 1)
    return {
        "prompts": [round(record["step"] * prompts_per_update) for record in evaluations],
        "accept_rate": [record["accept_rate"] for record in evaluations],
        "tokens_per_round": [record["tokens_per_round"] for record in evaluations],
        "updates": result.updates,
        "rollbacks": len(rollbacks),
        "new_tokens": result.progress.new_tokens,
        "seconds": result.progress.seconds,
    }


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}, {len(values)} seeds)"


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out accept rate over prompts: mean line, band from the lowest to the highest seed; where KL -> RL moves."""
    save_picture(lambda: _rates(result), path)


def _rates(result: dict[str, Any]) -> Figure:
    figure, runs, settings = new_figure(8, 4.2), result["runs"], result["settings"]
    axes = figure.subplots()
    for color, (name, seeds) in zip(CYCLE, runs.items(), strict=False):
        prompts = seeds[0]["prompts"]
        points = [[100 * rate for rate in rates] for rates in zip(*(s["accept_rate"] for s in seeds), strict=True)]
        axes.plot(prompts, [statistics.mean(point) for point in points], color=color, label=name)
        axes.fill_between(prompts, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.2)
    last = max(seeds[0]["prompts"][-1] for seeds in runs.values())
    rollouts_per_update = settings.get("update_every", 1) / max(settings["updates_per_rollout"], 1)  # earlier: not said
    prompts_per_update = settings["rollout_batch"] * rollouts_per_update
    begin = prompts_per_update * settings["objective"]["warmup"]
    end = begin + prompts_per_update * settings["objective"]["ramp"]
    if begin < last:
        share = min(1.0, (last - begin) / (end - begin)) if end > begin else 1.0
        label = f"KL -> RL moves to RL ({share:.0%} of the way)"
        axes.axvspan(begin, min(end, last), color=GREY, alpha=0.2, linewidth=0, label=label)
    axes.set_xlabel("prompts learned from, one pass")
    axes.set_ylabel("held-out drafts accepted (%)")
    axes.set_ylim(bottom=0)
    axes.grid()
    title = f"mean and range of {len(next(iter(runs.values())))} seeds"
    figure.legend(loc="outside upper left", ncols=5, title=title, title_fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(run_cli(main))
