"""Drafters compared at equal tokens of teacher forcing: kinds, exit layers, shared or separate trunk.

    python -m experiments.drafters --config experiments/configs/drafters.yaml --out DIR \\
        --runs exit_head:2 kangaroo:2 fused:2 exit_head:2:64 --decode exit_head:2 fused:2 --data heldout.jsonl

A run is DRAFTER:EXIT_LAYER or, with a lora_S of that rank inside the shallow layers and so a trunk of its own,
DRAFTER:EXIT_LAYER:RANK. Every run starts untrained, sees the same batches and is judged on the same held-out rows; the
learning rate falls over the whole run, so a curve's inner points are not what a shorter run would reach. Runs named in
`--decode` also decode held-out prompts, plain and speculatively. Writes DIR/drafters.json after every run, and
DIR/drafters_curves.png and DIR/drafters_layers.png.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig, DistillConfig, load_train_config
from dvi_jax.decode.acceptance import measure_acceptance
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.evaluate.style import CYCLE, GREY, mark_equal, new_figure, page_color, save_picture
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.offline import train_offline
from dvi_jax.loading import LoadedModel, enable_compilation_cache
from dvi_jax.model.drafters import DRAFTERS
from experiments.measure import environment, write_result
from experiments.objectives import recorded
from experiments.sweep import every_prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = (
    *("exit_head:2", "kangaroo:2", "fused:2", "fused:1", "fused:4", "fused:8", "exit_head:8", "exit_head:2:64"),
    *("exit_head:8:64", "fused:2:64"),
)


@dataclass(frozen=True)
class Spec:
    """One point of the grid. `shallow_rank` 0: shared trunk."""

    drafter: str
    exit_layer: int
    shallow_rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read DRAFTER:EXIT_LAYER[:RANK]."""
        kind, *numbers = text.split(":")
        if kind not in DRAFTERS or len(numbers) not in (1, 2) or not all(n.isdecimal() for n in numbers):
            raise UserError(f"a run is DRAFTER:EXIT_LAYER[:RANK], DRAFTER one of {', '.join(DRAFTERS)}; got {text!r}")
        return cls(kind, *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.drafter}:{self.exit_layer}" + (f":{self.shallow_rank}" if self.shallow_rank else "")

    @property
    def label(self) -> str:
        """For people."""
        trunk = f", own trunk (rank {self.shallow_rank})" if self.shallow_rank else ""
        return f"{self.drafter}, layer {self.exit_layer}{trunk}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; results are on the disk after every run."""
    parser = ArgumentParser(prog="python -m experiments.drafters", description=__doc__)
    parser.add_argument("--config", required=True, help="a distill config: data, tokens, batch, rate")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--decode", nargs="*", default=[], help="runs whose drafter also decodes, or all")
    parser.add_argument("--data", help="held-out prompts to decode (experiments/prompts.py)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--draft-steps", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    config = load_train_config(options.config, options.set)
    if not isinstance(config, DistillConfig):
        raise UserError(f"{options.config} must have trainer: distill")
    specs = [Spec.parse(text) for text in options.runs]
    decoded = specs if options.decode == ["all"] else [Spec.parse(text) for text in options.decode]
    if decoded and not options.data:
        raise UserError("--decode needs --data: a file of held-out prompts")
    decoding = DecodeConfig(draft_steps=options.draft_steps, max_new_tokens=options.new_tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "settings": recorded(config), "runs": {}}
    for spec in specs:
        record, model = run(config, spec)
        if spec in decoded:
            record["decoded"] = decode(model, options.data, options.prompts, decoding)
        result["runs"][str(spec)] = record
        write_result(options.out / "drafters.json", result)
        print(f"{spec}: held-out agreement {record['held_out'][0]:.3f}, {record['seconds']:.0f} s", flush=True)
    draw_both(result["runs"], options.out)
    show(result["runs"])
    return 0


def run(config: DistillConfig, spec: Spec) -> tuple[dict[str, Any], LoadedModel]:
    """Distil one drafter in a scratch directory: its curve, held-out agreement, speed; and the model with it."""
    settings = replace(config, drafter=spec.drafter, exit_layer=spec.exit_layer, shallow_rank=spec.shallow_rank)
    with tempfile.TemporaryDirectory() as scratch:
        result = train_offline(replace(settings, out=f"{scratch}/run"))
        updates = MetricsLog(Path(scratch) / "run" / "metrics.jsonl").records("train")
    params = result.model.params
    record = {
        "tokens": [update["tokens"] for update in updates],
        "agreement": [update["agreement"][0] for update in updates],
        "kl": [update["kl"][0] for update in updates],
        "held_out": result.after,  # of each draft that the drafter can tell apart
        "untrained": result.before,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves((params.drafter, params.lora_s))),
        "tokens_per_second": statistics.median(update["tokens_per_second"] for update in updates[1:] or updates),
        "seconds": result.seconds,
    }
    return record, result.model


def decode(model: LoadedModel, file: str, count: int, settings: DecodeConfig) -> dict[str, Any]:
    """Decode short held-out prompts as one batch: tokens per round, accept rates, outputs equal to plain decoding."""
    if model.tokenizer is None:
        raise UserError("decoding prompts needs a checkpoint with a tokenizer")
    prompts = list(every_prompt(file, model.tokenizer, count, 192).values())
    plain, _ = generate_batch(model, prompts, settings, plain=True)
    fast, _ = generate_batch(model, prompts, settings)
    acceptance = measure_acceptance(fast)
    return {
        "prompts": len(prompts),
        "draft_steps": settings.draft_steps,
        "tokens_per_round": acceptance.tokens_per_round,
        "accept_rate": acceptance.accept_rate,
        "per_position": acceptance.per_position,
        "identical": sum(a.output_ids == b.output_ids for a, b in zip(plain, fast, strict=True)),
    }


def draw_both(runs: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Both pictures, `drafters_curves.png` and `drafters_layers.png`; returns their paths."""
    curves, layers = folder / "drafters_curves.png", folder / "drafters_layers.png"
    return [*save_picture(lambda: draw_curves(runs), curves), *save_picture(lambda: draw_layers(runs), layers)]


def draw_curves(runs: dict[str, dict[str, Any]]) -> Figure:
    """First-draft agreement with the verifier on the training batches over tokens; a dot for the held-out rows."""
    figure = new_figure(9, 4.4)
    axes = figure.subplots()
    pairs = list(dict.fromkeys((spec.drafter, spec.exit_layer) for spec in map(Spec.parse, runs)))
    for name, record in runs.items():
        spec = Spec.parse(name)
        color = CYCLE[pairs.index((spec.drafter, spec.exit_layer)) % len(CYCLE)]
        style = "--" if spec.shallow_rank else "-"
        millions = [tokens / 1e6 for tokens in record["tokens"]]
        axes.plot(millions, percent(record["agreement"]), style, color=color, label=spec.label)
        axes.plot(millions[-1], 100 * record["held_out"][0], "o", color=color)
    axes.plot([], [], "o", color=GREY, label="the same, held-out rows")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of teacher forcing (millions)")
    axes.set_ylabel("first draft = verifier's token (%)")
    axes.set_ylim(bottom=0)
    axes.grid()
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_layers(runs: dict[str, dict[str, Any]]) -> Figure:
    """Bars for every run, by drafter, exit layer and trunk: held-out agreement, and tokens per round where decoded."""
    specs = sorted((Spec.parse(name) for name in runs), key=lambda s: (s.drafter, s.shallow_rank > 0, s.exit_layer))
    kinds = list(dict.fromkeys(spec.drafter for spec in specs))
    figure = new_figure(9, 0.9 + 0.36 * len(specs))
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(specs))
    colors = [CYCLE[kinds.index(spec.drafter)] for spec in specs]
    hatches = ["//" if spec.shallow_rank else "" for spec in specs]
    agreements = [100 * runs[str(spec)]["held_out"][0] for spec in specs]
    decoded = [(runs[str(spec)].get("decoded") or {}).get("tokens_per_round") for spec in specs]
    labels = ["not decoded" if value is None else f"{value:.2f}" for value in decoded]
    for axes, values, texts in (
        (panels[0], agreements, [f"{value:.1f}" for value in agreements]),
        (panels[1], [value or 0 for value in decoded], labels),
    ):
        bars = axes.barh(places, values, color=colors, hatch=hatches, edgecolor=page_color())
        axes.bar_label(bars, texts, fontsize=8, padding=2)
        axes.margins(x=0.15)
        axes.grid(axis="x")
    panels[0].set_yticks(places, [spec.label for spec in specs])
    panels[0].invert_yaxis()
    panels[0].set_xlabel("held-out rows: first draft right (%)")
    panels[1].set_xlabel("held-out prompts: tokens per round")
    mark_equal(panels[1], upright=True)
    return figure


def percent(shares: list[float]) -> list[float]:
    """Shares as percentages."""
    return [100 * share for share in shares]


def show(runs: dict[str, dict[str, Any]]) -> None:
    """One line for each run."""
    table = Table()
    table.add_column("run")
    for column in ("trained weights", "tokens", "tokens/s", "untrained", "agreement", "tokens / round", "identical"):
        table.add_column(column, justify="right")
    for name, record in runs.items():
        decoded = record.get("decoded")
        table.add_row(
            name,
            f"{record['parameters'] / 1e6:.2f}M",
            f"{record['tokens'][-1] / 1e6:.2f}M",
            f"{record['tokens_per_second']:.0f}",
            f"{record['untrained'][0]:.3f}",
            f"{record['held_out'][0]:.3f}",
            f"{decoded['tokens_per_round']:.3f}" if decoded else "-",
            f"{decoded['identical']} of {decoded['prompts']}" if decoded else "-",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
