"""Rollouts: generations with the drafter as it now is, that keep their learning signals on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import Generation, choose_plan, make_knobs, read_generations, start
from dvi_jax.decode.branches import most_branches
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.learn.replay import Windows, read_windows
from dvi_jax.loading import LoadedModel


def rollout(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    *,
    longest_prompt: int,
    branches: int = 0,
) -> tuple[Windows, list[Generation]]:
    """Decode `prompts` (none longer than `longest_prompt`) and read off their windows and statistics.

    Every rollout of a run has the same cache and window length, whatever its prompts, so the loop compiles once.
    `branches`: drafts not taken that a window keeps, at most.
    """
    knobs = make_knobs(settings, model.eos_ids)
    plan = choose_plan(model, settings)
    most = min(branches, most_branches(plan))
    state = start(model, prompts, settings, knobs, record=True, branches=most, longest_prompt=longest_prompt)
    state = decode_rounds(model.definition, model.decode_params, state, knobs, plan)
    lengths = [len(prompt) for prompt in prompts]
    window = window_length(settings, longest_prompt)
    windows = read_windows(state, np.array(lengths, np.int32), window=window, branches=branches)
    return windows, read_generations(state, lengths, model.eos_ids)


def window_length(settings: DecodeConfig, longest_prompt: int) -> int:
    """Positions a window needs for the longest prompt and every new token."""
    return longest_prompt + settings.max_new_tokens
