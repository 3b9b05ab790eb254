"""Online against frozen when the traffic changes: chat, then code, then translation; accept rate over time.

    python -m experiments.domain_shift --config experiments/configs/domain_shift.yaml --seeds 3 --out DIR

The config's files are the domains, in order. Both runs decode the same prompts with the same starting drafter; every
prompt is met once, before anything was learned from it. The frozen run makes no update.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvi_jax.config import TrainConfig, load_train_config
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.evaluate.plots import new_figure
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.online import train
from dvi_jax.load import enable_compilation_cache
from experiments.measure import environment
from experiments.objectives import spread


def main() -> int:
    """Run online (per seed) and frozen, write DIR/domain_shift.json and .png."""
    parser = ArgumentParser(prog="python -m experiments.domain_shift", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-domain", type=int, required=True, help="prompts in each of the config's files")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    config = load_train_config(options.config, options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    frozen = run(replace(config, updates_per_rollout=0))
    online = [run(replace(config, seed=seed)) for seed in range(options.seeds)]
    domains = [Path(file).stem for file in config.data.files]
    summary = compare(frozen, online, domains, options.per_domain)
    result = {"environment": environment(), "config": options.config, "set": options.set, "summary": summary}
    result |= {"frozen": frozen, "online": online}
    (options.out / "domain_shift.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(frozen, online, domains, options.per_domain, options.out / "domain_shift.png")
    for domain, row in summary.items():
        print(f"{domain:12s} frozen {row['frozen']:.1%}  online {spread(row['online'])}")
    return 0


def run(config: TrainConfig) -> dict[str, Any]:
    """One run in a scratch directory: for each rollout, prompts so far, accepted and judged drafts, seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        train(replace(config, out=f"{scratch}/run"))
        records = MetricsLog(Path(scratch) / "run" / "metrics.jsonl").records("train")
    names = ("prompts", "accept_rate", "tokens_per_round", "rollout_seconds", "update_seconds")
    return {name: [record[name] for record in records] for name in names}


def compare(frozen: dict, online: list[dict], domains: list[str], per_domain: int) -> dict[str, Any]:
    """Mean accept rate over the second half of every domain."""

    def mean(run: dict, index: int) -> float:
        begin, end = (index + 0.5) * per_domain, (index + 1) * per_domain
        pairs = zip(run["prompts"], run["accept_rate"], strict=True)
        return statistics.mean(rate for prompts, rate in pairs if begin < prompts <= end)

    return {
        domain: {"frozen": mean(frozen, index), "online": [mean(run, index) for run in online]}
        for index, domain in enumerate(domains)
    }


def draw(frozen: dict, online: list[dict], domains: list[str], per_domain: int, path: Path) -> None:
    """Accept rate over prompts, smoothed over five rollouts; a line where the domain changes."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for index, run_ in enumerate(online):
        label = "online" if not index else None
        axes.plot(run_["prompts"], smooth(run_["accept_rate"]), color="tab:blue", alpha=0.7, label=label)
    axes.plot(frozen["prompts"], smooth(frozen["accept_rate"]), color="tab:gray", label="frozen")
    for index, domain in enumerate(domains):
        axes.axvline(index * per_domain, color="0.8", linewidth=1)
        axes.text((index + 0.5) * per_domain, 0.97, domain, transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set_xlabel("prompts served")
    axes.set_ylabel("accept rate (%)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def smooth(rates: list[float], width: int = 5) -> list[float]:
    """Trailing mean in percent."""
    return [100 * statistics.mean(rates[max(i - width + 1, 0) : i + 1]) for i in range(len(rates))]


if __name__ == "__main__":
    sys.exit(run_cli(main))
