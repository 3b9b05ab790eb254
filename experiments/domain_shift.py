"""Online against frozen when the traffic changes: chat, then code, then translation; and what learning costs.

    python -m experiments.domain_shift --config experiments/configs/domain_shift.yaml --per-domain 512 --out DIR

The config's files are the domains, in order; each must give `--per-domain` prompts to learn from. All runs decode the
same prompts with the same starting drafter, the checkpoint's or that of `--drafter-from`; every prompt is met once,
before anything was learned from it. The frozen run makes no update. Seeds share their prompts, so their spread does
not say how much chance there is in a difference: the standard error over rollouts does. What updates cost is measured
apart (`learning_cost.py`). Writes DIR/domain_shift.json after every run, and DIR/domain_shift.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvi_jax.checkpoint import rewrite_checkpoint
from dvi_jax.config import TrainConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import PromptStream
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.evaluate.style import BLUE, GREY, new_figure, save_picture
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.online import train_online
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.trained_parts import with_drafter_from
from experiments.learning_cost import cost_of_learning
from experiments.measure import environment, write_result
from experiments.objectives import online_config, recorded, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEVER = 10**9

Run = dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run frozen, online (per seed) and for the cost; results are on the disk after every run."""
    parser = ArgumentParser(prog="python -m experiments.domain_shift", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument(
        "--per-domain", type=at_least_one, required=True, help="training prompts in each of the config's files"
    )
    parser.add_argument("--cost-prompts", type=at_least_one, default=256, help="prompts of a stretch, for the cost")
    parser.add_argument("--cost-pairs", type=at_least_one, default=7, help="stretches without and with updates")
    parser.add_argument("--drafter-from", metavar="DIR", help="a directory whose trained drafter to begin with")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    config = online_config(options.config, options.set)
    if options.drafter_from is None:
        return compare_runs(config, options)
    with tempfile.TemporaryDirectory() as scratch:
        warm = Path(scratch) / Path(options.drafter_from).name
        rewrite_checkpoint(with_drafter_from(open_checkpoint(config.checkpoint), options.drafter_from), warm)
        return compare_runs(replace(config, checkpoint=str(warm)), options)


def compare_runs(config: TrainConfig, options: argparse.Namespace) -> int:
    """All runs from the checkpoint's drafter; 1 if learning changed what the cost's stretches wrote."""
    domains = [Path(file).stem for file in config.data.files]
    check_stream(config, options.per_domain)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "domain_shift.json"
    result: dict[str, Any] = {"environment": environment(), "settings": recorded(config)}
    began = time.perf_counter()

    def tell(text: str) -> None:
        write_result(path, result)
        print(f"{time.perf_counter() - began:5.0f} s  {text}", flush=True)

    frozen = run(replace(config, updates_per_rollout=0))
    online: list[Run] = []
    result |= {"domains": domains, "per_domain": options.per_domain, "frozen": frozen, "online": online}
    tell("frozen")
    cost = cost_of_learning(config, prompts=options.cost_prompts, pairs=options.cost_pairs)
    result["cost"] = cost
    tell(f"{options.cost_pairs} pairs of stretches for the cost")
    for seed in range(options.seeds):
        online.append(run(replace(config, seed=seed)))
        result["summary"] = compare(frozen, online, domains, options.per_domain)
        tell(f"seed {seed}: " + ", ".join(f"{d} {row['online'][-1]:.1%}" for d, row in result["summary"].items()))
    draw(frozen, online, domains, options.per_domain, path.with_suffix(".png"))
    for domain, row in result["summary"].items():
        change = f"{100 * row['change']:+.2f}" + (f" +- {100 * row['error']:.2f}" if row["error"] is not None else "")
        print(f"{domain:12s} frozen {row['frozen']:.1%}  online {spread(row['online'])}  change {change} points")
    print(
        f"tokens/s without updates {cost['off']:.0f}, with {cost['on']:.0f}: learning costs {cost['share']:.1%}"
        f" (median; {min(cost['shares']):.1%} to {max(cost['shares']):.1%} in {options.cost_pairs} pairs),"
        f" {'equal' if cost['same_output'] else 'DIFFERENT'} outputs"
    )
    for name in ("rollout_seconds", "update_seconds"):
        off, on = (seconds / cost["rollouts"] for seconds in cost[name])
        print(f"{name} of a rollout, without and with updates: {off:.4f}, {on:.4f}")
    return int(not cost["same_output"])


def check_stream(config: TrainConfig, per_domain: int) -> None:
    """Raise `UserError` unless every file gives just `per_domain` prompts and the run reads them all.

    Otherwise the traffic would not change where the summary and the picture say so.
    """
    data = config.data
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(config.checkpoint))
    stream = PromptStream(ConversationStream(data.files), tokenizer, data)
    given = Counter(prompt.position.file for prompt in stream)
    if any(given[index] != per_domain for index in range(len(data.files))):
        found = ", ".join(f"{Path(file).name} {given[index]}" for index, file in enumerate(data.files))
        left_out = ", ".join(f"{reason}: {count}" for reason, count in sorted(stream.counts.items())) or "none"
        raise UserError(
            f"--per-domain {per_domain}: each file must give that many prompts of at most {data.max_prompt_tokens}"
            f" tokens, but they give {found} ({stream.conversations.summary()}; prompts left out: {left_out})"
        )
    if config.prompts < per_domain * len(data.files):
        raise UserError(f"prompts is {config.prompts}: {len(data.files)} files of {per_domain} prompts need as many")


def run(config: TrainConfig) -> Run:
    """One run in a scratch directory: for each rollout prompts and tokens so far, acceptance, and what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        # Neither evaluations nor snapshots between rollouts.
        train_online(replace(config, out=f"{scratch}/run", eval_every=NEVER, save_every=NEVER))
        records = MetricsLog(Path(scratch) / "run" / "metrics.jsonl").records("train")
    names = ("prompts", "new_tokens", "accept_rate", "tokens_per_round", "rollout_seconds", "update_seconds")
    return {name: [record[name] for record in records] for name in names}


def compare(frozen: Run, online: list[Run], domains: list[str], per_domain: int) -> dict[str, Any]:
    """Accept rates over the second half of every domain: `frozen`, `online` for each seed, means over rollouts.

    `change` is the mean over seeds less the frozen rate, `error` its standard error over the rollouts, each compared
    with the frozen one of the same prompts (None for a single rollout).
    """

    def second_half(index: int) -> dict[str, Any]:
        begin, end = (index + 0.5) * per_domain, (index + 1) * per_domain
        inside = [number for number, prompts in enumerate(frozen["prompts"]) if begin < prompts <= end]
        if not inside:
            raise UserError(f"no rollout in the second half of {domains[index]}: raise prompts or lower --per-domain")
        before, *after = ([run_["accept_rate"][number] for number in inside] for run_ in (frozen, *online))
        changes = [statistics.mean(rates) - rate for rate, *rates in zip(before, *after, strict=True)]
        error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
        rates = {"frozen": statistics.mean(before), "online": [statistics.mean(rates) for rates in after]}
        return rates | {"change": statistics.mean(changes), "error": error}

    return {domain: second_half(index) for index, domain in enumerate(domains)}


def draw(frozen: Run, online: list[Run], domains: list[str], per_domain: int, path: Path) -> None:
    """Accept rate over prompts, smoothed over five rollouts: seeds' mean and range; a line where the domain changes."""
    save_picture(lambda: _rates(frozen, online, domains, per_domain), path)


def _rates(frozen: Run, online: list[Run], domains: list[str], per_domain: int) -> Figure:
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    prompts = frozen["prompts"]
    points = list(zip(*(smooth(run_["accept_rate"]) for run_ in online), strict=True))
    axes.plot(prompts, smooth(frozen["accept_rate"]), color=GREY, label="frozen")
    label = f"online, mean and range of {len(online)} seeds"
    axes.plot(prompts, [statistics.mean(point) for point in points], color=BLUE, label=label)
    axes.fill_between(prompts, [min(p) for p in points], [max(p) for p in points], color=BLUE, alpha=0.25)
    for index, domain in enumerate(domains):
        axes.axvline(index * per_domain, color=GREY, linewidth=1)
        axes.text((index + 0.5) * per_domain, 0.98, domain, transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.margins(x=0)
    axes.set_xlabel("prompts served")
    axes.set_ylabel("drafts accepted (%), mean of 5 rollouts")
    axes.grid(axis="y")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def smooth(rates: list[float], width: int = 5) -> list[float]:
    """Trailing mean in percent."""
    return [100 * statistics.mean(rates[max(i - width + 1, 0) : i + 1]) for i in range(len(rates))]


if __name__ == "__main__":
    sys.exit(run_cli(main))
