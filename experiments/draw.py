"""Draws kept results again, each as two PNGs beside its JSON: NAME.png, and NAME-dark.png for dark pages.

    python -m experiments.draw experiments/results/sweep_smollm2_h100.json ...

What a file is, is read off what it holds: results of sweep, objectives, domain_shift, distill_curve, drafters, losses,
curves, speed and soak, and the summary.json of an evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.text_files import read_json
from experiments import curves, distill_curve, domain_shift, drafters, losses, objectives, soak, speed_plots, sweep
from experiments.compare import plot_comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every file and print the names of the pictures."""
    parser = ArgumentParser(prog="python -m experiments.draw", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    for path in parser.parse_args(arguments).results:
        for picture in draw(read_json(path), path):
            print(picture)
    return 0


def draw(result: Any, path: Path) -> list[Path]:
    """The pictures for light pages of a result read from `path`; raises `UserError` for what no experiment wrote."""
    picture, keys = path.with_suffix(".png"), set(result) if isinstance(result, dict) else set()
    if "overall" in keys:
        settings = result["settings"]
        stop = "adaptive" if settings.get("draft_cost") else f"threshold {settings['threshold']:g}"
        how = settings.get("plan") or f"{settings['draft_steps']} drafts"
        name = f"{settings['drafter']}, {how}, {stop}"
        plot_comparison({name: result}, picture)
    elif "stages" in keys:
        distill_curve.draw(result["stages"], picture)
    elif {"rows", "compile"} <= keys:
        speed_plots.draw(result, picture)
    elif "samples" in keys:
        soak.draw([soak.Sample(**sample) for sample in result["samples"]], result["warm_up_minutes"], picture)
    elif "losses" in keys:
        losses.draw(result["losses"], picture)
    elif "curves" in keys:
        curves.draw(result["curves"], picture)
    elif {"frozen", "online"} <= keys:
        domain_shift.draw(result["frozen"], result["online"], result["domains"], result["per_domain"], picture)
    elif "rows" in keys and all("threshold" in row for row in result["rows"]):
        sweep.draw(result["rows"], picture)
    elif "runs" in keys and all(isinstance(runs, list) for runs in result["runs"].values()):
        objectives.draw(result, picture)
    elif "runs" in keys and all("agreement" in run for run in result["runs"].values()):
        return drafters.draw_both(result["runs"], path.parent)
    else:
        raise UserError(f"{path} holds no result with a picture that this command draws")
    return [picture]


if __name__ == "__main__":
    sys.exit(run_cli(main))
