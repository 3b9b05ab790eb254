"""What a draft costs on this device, measured: the number that `DecodeConfig.draft_cost` wants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import choose_plan, make_knobs, start
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.loading import LoadedModel

ROUNDS = 2
REPEATS = 3


def measure_draft_cost(model: LoadedModel, state: DecodeState, settings: DecodeConfig) -> float:
    """Seconds of a draft over seconds of a round that drafts nothing, from a few rounds of the compiled programs.

    `state` (just prefilled) is left as it is. 0 where nothing can be drafted.
    """
    plain, _ = round_seconds(model, state, choose_plan(model, settings, plain=True), 0)
    drafting, drafts = round_seconds(model, state, choose_plan(model, settings), settings.draft_steps)
    return min(max(drafting / plain - 1, 0.0) / drafts, 1.0) if drafts else 0.0


def with_measured_cost(model: LoadedModel, prompt: Sequence[int], settings: DecodeConfig) -> DecodeConfig:
    """`settings` with the cost of a draft as measured behind `prompt` (token ids)."""
    state = start(model, [prompt], settings, make_knobs(settings, ()))
    return replace(settings, draft_cost=measure_draft_cost(model, state, settings))


def round_seconds(
    model: LoadedModel, state: DecodeState, plan: Plan, draft_steps: int, rounds: int = ROUNDS
) -> tuple[float, float]:
    """Seconds of a round, and drafts in it. Every round drafts all it may; nothing ends a sequence.

    From generations of `rounds` and of three times as many: the difference is free of what starting a program takes.
    """
    short, few, _ = _run(model, state, plan, Knobs.make(draft_steps, 0.0, (), until=rounds))
    long, many, drafts = _run(model, state, plan, Knobs.make(draft_steps, 0.0, (), until=3 * rounds))
    if many > few and long > short:
        return (long - short) / (many - few), drafts
    return long / many, drafts  # the state has no room for more rounds


def _run(model: LoadedModel, state: DecodeState, plan: Plan, knobs: Knobs) -> tuple[float, int, float]:
    """Median seconds of the generation, its rounds, and drafts in one; the state is left as it is."""
    seconds = []
    for _ in range(REPEATS + 1):
        copied = jax.block_until_ready(jax.tree.map(jnp.copy, state.replace(done=jnp.zeros_like(state.done))))
        began = time.perf_counter()
        copied = jax.block_until_ready(decode_rounds(model.definition, model.decode_params, copied, knobs, plan))
        seconds.append(time.perf_counter() - began)
    rounds = max(int(copied.rounds), 1)
    drafts = float(np.max(np.sum(copied.drafted, axis=1)))
    return statistics.median(seconds[1:]), rounds, drafts / rounds
