"""What the speed suite measures: a list of cases, each a few compiled programs, and how one is measured.

Compiling dominates (about ten seconds a program), so a case takes every measurement its programs can serve: the length
of the context is a run-time value, while batch, cache length, width and the number of drafts compile anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dvi_jax.decode.memory import workspace_bytes
from dvi_jax.decode.plan import Plan, plan_for
from dvi_jax.loading import LoadedModel
from experiments.measure import compile_decode, filled_state, floor_of, time_decode

LONG = 16384
COMPILE_SECONDS = {"tiny": 2, "smollm2": 10, "1b": 9, "7b": 12, "13b": 15}  # about, on an H100


@dataclass(frozen=True)
class Case:
    """One program, and the contexts and draft counts to run it with."""

    part: str
    shape: str
    width: int
    drafts: tuple[int, ...]  # at most width - 1; 0 is plain decoding
    batch: int = 1
    slots: int = 256
    prompts: tuple[int, ...] = (128,)  # tokens that lie in the cache already
    new_tokens: int = 64
    plans: tuple[Plan, ...] = ()  # in place of `drafts`

    @property
    def rows(self) -> int:
        """Measurements."""
        return len(self.prompts) * len(self.plans or self.drafts)

    def seconds(self) -> float:
        """About how long it takes on an H100."""
        return COMPILE_SECONDS[self.shape] + 4.0 * self.rows


def suite() -> list[Case]:
    """Every case, so ordered that each model is made once."""
    cases = []
    for shape in ("7b", "13b", "1b"):
        cases += [Case(shape, shape, 1, (0,)), Case(shape, shape, 6, (0, 5))]
    cases.append(Case("7b-drafts", "7b", 8, tuple(range(8))))
    cases.append(Case("7b-context", "7b", 1, (0,), slots=512, prompts=(440,)))
    cases.append(Case("7b-context", "7b", 1, (0,), slots=LONG, prompts=(440, 2048, 4096, 8192, LONG - 72)))
    cases.append(Case("7b-context", "7b", 6, (0, 5), slots=LONG, prompts=(440, LONG - 72)))
    cases += [Case("7b-batch", "7b", 1, (0,), batch=batch, slots=512, prompts=(440,)) for batch in (8, 32, 64)]
    cases.append(Case("7b-batch", "7b", 6, (0, 5), batch=8, slots=512, prompts=(440,)))
    small = Case("smollm2", "smollm2", 1, (0,), slots=512, new_tokens=256)
    cases += [small, replace(small, width=4, drafts=(0, 3)), replace(small, width=6, drafts=(0, 5))]
    cases += [replace(small, part="smollm2-batch", batch=batch) for batch in (8, 32, 64)]
    cases.append(replace(small, part="smollm2-context", slots=LONG, prompts=(128, 4096, LONG - 264)))
    return sorted(cases, key=lambda case: ("7b", "smollm2", "1b", "13b").index(case.shape))


PARTS = sorted({case.part for case in suite()})


def measure(model: LoadedModel, case: Case, repeats: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for every context and plan of `case`."""
    floor = floor_of(model, case.batch)
    fresh = partial(filled_state, model, case.batch, case.slots, case.width, new_tokens=case.new_tokens)
    for plan in case.plans or [plan_for(drafts, drafts_blocks=model.drafts_blocks) for drafts in case.drafts]:
        drafts = plan.drafts
        program, compile_seconds = compile_decode(model, fresh(case.prompts[0]), plan)
        for prompt in case.prompts:
            timing = time_decode(program, model, partial(fresh, prompt), drafts, repeats)
            context = prompt + case.new_tokens / 2
            floor_bytes = floor.bytes(timing.drafted_per_round, context)
            floor_ms = 1e3 * floor_bytes / bandwidth
            yield {
                "part": case.part,
                "shape": case.shape,
                "mode": "speculative" if drafts else "plain",
                "batch": case.batch,
                "width": case.width,
                "drafts": drafts,
                "plan": str(plan),
                "slots": case.slots,
                "context": context,
                **vars(timing),
                "floor_bytes": floor_bytes,
                "floor_ms": floor_ms,
                "floor_fraction": floor_ms / timing.round_ms,
                "compile_seconds": compile_seconds,
                "workspace_bytes": workspace_bytes(program, 0),
                "copy_gb_per_s": bandwidth / 1e9,
            }


def findings(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that the rows were measured for; those whose rows are missing are left out."""
    found: dict[str, float] = {}
    for shape in sorted({row["shape"] for row in rows}):
        own = [row for row in rows if row["shape"] == shape]
        plain = [row for row in own if row["mode"] == "plain" and row["width"] == 1]
        found |= _growth(shape, [row for row in plain if row["batch"] == 1 and row["slots"] >= LONG])
        found |= _batches(shape, plain)
        short = [row for row in own if row["batch"] == 1 and row["slots"] < LONG]
        for row in short:
            if row["mode"] == "plain" and row["width"] == 1:
                found[f"{shape}: plain, fraction of the floor at context {row['context']:.0f}"] = row["floor_fraction"]
            elif row["drafts"] == row["width"] - 1:
                found[f"{shape}: round with {row['drafts']} drafts over its floor"] = 1 / row["floor_fraction"]
    return found


def _growth(shape: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time of a token at the longest context over the shortest, against the same ratio of bytes."""
    if len(rows) < 2:
        return {}
    first, last = min(rows, key=lambda row: row["context"]), max(rows, key=lambda row: row["context"])
    measured, predicted = last["round_ms"] / first["round_ms"], last["floor_bytes"] / first["floor_bytes"]
    name = f"{shape}: token at context {last['context']:.0f} over {first['context']:.0f}"
    return {name: measured, f"{name}, over what its bytes predict": measured / predicted}


def _batches(shape: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of every batch over batch 1, at the nearest cache length."""
    ratios = {}
    for row in rows:
        singles = [one for one in rows if one["batch"] == 1 and one["slots"] == row["slots"]]
        if row["batch"] > 1 and singles:
            ratio = row["tokens_per_second"] / singles[0]["tokens_per_second"]
            ratios[f"{shape}: tokens per second, batch {row['batch']} over batch 1"] = ratio
    return ratios
