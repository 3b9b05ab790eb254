"""Generation for callers on the host: token ids in, token ids and statistics out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import numpy as np

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.kernel_loading import load_kernels
from dvi_jax.decode.plan import PLAIN, Option, Plan, check_plan, plan_for, rows_alike, trees_are_plain
from dvi_jax.decode.prefill import bucket, cache_slots, prefill
from dvi_jax.decode.prefix import Prefix, pad_prompts
from dvi_jax.decode.sampling import Sampling
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import NO_TOKEN, DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import check_batch, to_host
from dvi_jax.model.product_blocks import MOST_ROWS
from dvi_jax.settings import INT32

MOST_EOS_IDS = 8  # more would be another compiled program


@dataclass(frozen=True)
class Generation:
    """One finished sequence. `accept_lengths` and `drafted` hold one number per round."""

    output_ids: list[int]  # prompt included
    new_ids: list[int]
    accept_lengths: list[int]
    drafted: list[int]
    finish_reason: str  # "eos", "length", or "stop" (a stop string, when streaming)

    @property
    def rounds(self) -> int:
        """Verification passes."""
        return len(self.accept_lengths)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were committed."""
        return sum(length - 1 for length in self.accept_lengths)


class Chooser(Protocol):
    """Chooses plans while decoding."""

    def begin(self) -> Option:
        """How the next generation begins."""

    def decode(self, state: DecodeState, knobs: Knobs, option: Option) -> DecodeState:
        """Rounds until every sequence is done; the state is donated."""


def generate_batch(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    *,
    plain: bool = False,
    eos_ids: tuple[int, ...] | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    prefix: Prefix | None = None,
    longest_prompt: int = 0,
    chooser: Chooser | None = None,
) -> tuple[list[Generation], float]:
    """Continuations of `prompts` (token ids), as one batch, and the seconds that decoding took.

    `plain` drafts nothing, in verifying passes of the same row class, so the ids are equal. `eos_ids`
    replaces the model's own; `()` never stops early. `sampling`: one setting for each prompt, or one for all (sequence
    b then takes seed + b); None is greedy. `prefix`: what all prompts begin with, taken in before by `make_prefix`.
    `longest_prompt` gives a stream of batches one cache length. `chooser` chooses how rounds draft (`choosing.py`), at
    most `draft_steps` drafts; a plan that it changes to may have to be compiled first.
    """
    eos = model.eos_ids if eos_ids is None else eos_ids
    option = None if chooser is None else chooser.begin()
    settings = settings if option is None else option.settings(settings)
    knobs = make_knobs(settings, eos, plain=plain)
    drawn = make_sampling(model, prompts, sampling)
    state = start(model, prompts, settings, knobs, sampling=drawn, prefix=prefix, longest_prompt=longest_prompt)
    state = jax.block_until_ready(state)
    plan = choose_plan(model, settings, plain=plain) if option is None else option.plan
    # Compiled ahead: `seconds` never holds a compilation. jax keeps the program, a repeat costs milliseconds.
    program = decode_rounds.lower(model.definition, model.decode_params, state, knobs, plan).compile()
    began = time.perf_counter()
    if chooser is None or option is None:
        state = jax.block_until_ready(program(model.decode_params, state, knobs))
    else:
        state = jax.block_until_ready(chooser.decode(state, knobs, option))
    seconds = time.perf_counter() - began
    return read_generations(state, [len(p) for p in prompts], eos), seconds


def make_knobs(settings: DecodeConfig, eos_ids: tuple[int, ...], *, plain: bool = False) -> Knobs:
    """Run-time settings of a generation; `plain` drafts nothing."""
    check_eos_ids(eos_ids)
    return Knobs.make(
        0 if plain else settings.draft_steps,
        settings.threshold,
        eos_ids,
        draft_cost=settings.draft_cost,
        room=MOST_EOS_IDS,
    )


def make_sampling(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig | Sequence[SamplingConfig] | None
) -> Sampling | None:
    """One setting for each prompt; None where all is greedy."""
    if sampling is None:
        return None
    if isinstance(sampling, SamplingConfig):
        each = [replace(sampling, seed=(sampling.seed + b) % 2**32) for b in range(len(prompts))]
    else:
        each = list(sampling)
    if len(each) != len(prompts):
        raise UserError(f"{len(each)} sampling settings for {len(prompts)} prompts")
    if len({one.coupled for one in each}) > 1:
        raise UserError("the sequences of a batch must agree on `coupled`")
    check_prompts(model, prompts, 0)
    return Sampling.make(each, prompts, model.config.vocab_size) if each else None


def start(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    knobs: Knobs,
    *,
    sampling: Sampling | None = None,
    prefix: Prefix | None = None,
    record: bool = False,
    branches: int = 0,
    longest_prompt: int = 0,
) -> DecodeState:
    """Check the prompts, pad them and prefill, all but a shared `prefix`. `longest_prompt` fixes the cache length.

    `record` keeps learning signals, and `branches` drafts not taken of a position (`branches.py`).
    """
    check_prompts(model, prompts, settings.max_new_tokens)
    check_rows(model, choose_plan(model, settings), len(prompts))
    check_batch(model.definition.mesh, len(prompts), "a batch")
    tokens, lengths = pad_prompts(prompts, prefix)
    longest = max(longest_prompt, *map(len, prompts))
    state = prefill(
        model.definition,
        model.decode_params,
        tokens,
        lengths,
        lengths + settings.max_new_tokens,
        knobs.eos_ids,
        slots=slots_for(longest, settings),
        width=settings.width,
        record=record,
        branches=branches,
        sampling=sampling,
        prefix=prefix and prefix.filled,
    )
    load_kernels(model, state, knobs, choose_plan(model, settings), PLAIN)
    return state


def slots_for(longest_prompt: int, settings: DecodeConfig) -> int:
    """Cache slots of a generation whose longest prompt has so many tokens."""
    return cache_slots(bucket(longest_prompt) + settings.max_new_tokens + settings.width)


def check_prompts(model: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `UserError` for an empty batch or prompt, ids outside the vocabulary, or a context that is too short."""
    config = model.config
    if not len(prompts):
        raise UserError("a batch needs at least one prompt")
    if not all(len(p) for p in prompts):
        raise UserError("a prompt needs at least one token")
    for prompt in prompts:
        if isinstance(prompt, str) or not all(hasattr(token, "__index__") for token in prompt):
            raise UserError(f"a prompt is token ids here, got {prompt!r:.60}: generate_text takes texts and messages")
        ids = np.asarray(prompt)
        if ids.dtype.kind not in "iu" or not np.all((ids >= 0) & (ids < config.vocab_size)):
            raise UserError(f"prompt ids must be between 0 and {config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > config.context_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and {max_new_tokens} new ones were asked for;"
                f" the model's context holds {config.context_length}"
            )


def choose_plan(model: LoadedModel, settings: DecodeConfig, *, plain: bool = False) -> Plan:
    """How rounds draft: as the settings say, or as suits drafter and device; `UserError` where that cannot be."""
    blocks = model.drafts_blocks
    plan = Plan.parse(settings.plan) if settings.plan else plan_for(settings.draft_steps, drafts_blocks=blocks)
    check_plan(plan, model.manifest.drafter, drafts_blocks=blocks, max_drafts=model.max_drafts)
    if plan.rows > settings.width and plan.kind != "tree":
        raise UserError(f"plan {plan} makes more than draft_steps {settings.draft_steps} drafts")
    if plan.rows > settings.width and not rows_alike(plan.rows, model.config, model.manifest.dtype):
        raise UserError(
            f"plan {plan}: without the GPU's kernels a tree has at most draft_steps + 1 rows, here {settings.width}"
        )
    # A plan that asks before each draft drafts nothing for nothing: no other program is needed.
    return PLAIN if plain and plan.kind != "early-exit" else plan


def check_eos_ids(eos_ids: Sequence[int]) -> None:
    """Raise `UserError` for end-of-sequence ids that are too many or cannot be ids."""
    if len(eos_ids) > MOST_EOS_IDS:
        raise UserError(f"at most {MOST_EOS_IDS} end-of-sequence ids, got {len(eos_ids)}")
    if not all(NO_TOKEN <= token <= INT32 for token in eos_ids):  # NO_TOKEN: none, as --eos-id -1 asks for
        raise UserError(
            f"end-of-sequence ids must be between 0 and {INT32}, or -1 for none, got {', '.join(map(str, eos_ids))}"
        )


def check_rows(model: LoadedModel, plan: Plan, batch: int) -> None:
    """Raise `UserError` for trees of more rows, over the batch, than have the bits of plain decoding."""
    if plan.kind == "tree" and not trees_are_plain(batch, plan, model.config, model.manifest.dtype):
        raise UserError(f"plan {plan}: {batch} such trees have more than {MOST_ROWS} rows, the most of a round")


def read_generations(state: DecodeState, prompt_lengths: Sequence[int], eos_ids: tuple[int, ...]) -> list[Generation]:
    """Copy a finished batch to the host, once."""
    tokens, lengths, accept, drafted = to_host((state.tokens, state.length, state.accept_lengths, state.drafted))
    generations = []
    for b, prompt_length in enumerate(prompt_lengths):
        ids = tokens[b, : lengths[b]].tolist()
        rounds = int((accept[b] > 0).sum())
        generations.append(
            Generation(
                output_ids=ids,
                new_ids=ids[prompt_length:],
                accept_lengths=accept[b, :rounds].tolist(),
                drafted=drafted[b, :rounds].tolist(),
                finish_reason="eos" if ids[-1] in eos_ids else "length",
            )
        )
    return generations
