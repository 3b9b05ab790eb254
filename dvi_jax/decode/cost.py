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
ENOUGH_SECONDS = 3.0  # of a generation's repeats: what took so long needs no median


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
    _run_once(model, state, plan, Knobs.make(draft_steps, 0.0, (), until=1))  # compiles
    short, few, _ = _run(model, state, plan, Knobs.make(draft_steps, 0.0, (), until=rounds))
    long, many, drafts = _run(model, state, plan, Knobs.make(draft_steps, 0.0, (), until=3 * rounds))
    if many > few and long > short:
        return (long - short) / (many - few), drafts
    return long / many, drafts  # the state has no room for more rounds


def _run(model: LoadedModel, state: DecodeState, plan: Plan, knobs: Knobs) -> tuple[float, int, float]:
    """Median seconds of the generation, its rounds, and drafts in one; the state is left as it is."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
        took, ended = _run_once(model, state, plan, knobs)
        seconds.append(took)
    rounds = max(int(ended.rounds), 1)
    drafts = float(np.max(np.sum(ended.drafted, axis=1)))
    return statistics.median(seconds), rounds, drafts / rounds


def _run_once(model: LoadedModel, state: DecodeState, plan: Plan, knobs: Knobs) -> tuple[float, DecodeState]:
    """Seconds of the generation, and what it ends in; the state is left as it is."""
    copied = jax.block_until_ready(jax.tree.map(jnp.copy, state.replace(done=jnp.zeros_like(state.done))))
    began = time.perf_counter()
    ended = jax.block_until_ready(decode_rounds(model.definition, model.decode_params, copied, knobs, plan))
    return time.perf_counter() - began, ended
