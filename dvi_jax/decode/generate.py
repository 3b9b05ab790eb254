"""Generation for callers on the host: token ids in, token ids and statistics out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.prefill import bucket, prefill
from dvi_jax.decode.speculative import decode
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.load import LoadedModel


@dataclass(frozen=True)
class Generation:
    """One finished sequence. `accept_lengths` and `drafted` hold one number per round."""

    output_ids: list[int]  # prompt included
    new_ids: list[int]
    accept_lengths: list[int]
    drafted: list[int]
    finish_reason: str  # "eos" or "length"

    @property
    def rounds(self) -> int:
        """Verification passes."""
        return len(self.accept_lengths)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were committed."""
        return sum(length - 1 for length in self.accept_lengths)


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    *,
    plain: bool = False,
    eos_ids: tuple[int, ...] | None = None,
    longest_prompt: int = 0,
) -> tuple[list[Generation], float]:
    """Greedy continuations of `prompts` (token ids), as one batch, and the seconds that decoding took.

    `plain` drafts nothing, in the same compiled program (width `draft_steps + 1`), so the ids are equal. `eos_ids`
    replaces the model's own; `()` never stops early. `longest_prompt` gives a stream of batches one cache length.
    """
    eos = model.eos_ids if eos_ids is None else eos_ids
    knobs = Knobs.make(0 if plain else settings.draft_steps, settings.threshold, eos)
    state = jax.block_until_ready(start(model, prompts, settings, knobs, longest_prompt=longest_prompt))
    # Compiled ahead so that `seconds` never holds a compilation; jax keeps the program, a repeat costs milliseconds.
    program = decode.lower(model.graphdef, model.decode_params, state, knobs).compile()
    began = time.perf_counter()
    state = jax.block_until_ready(program(model.decode_params, state, knobs))
    seconds = time.perf_counter() - began
    return read_generations(state, [len(p) for p in prompts], eos), seconds


def start(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    knobs: Knobs,
    *,
    record: bool = False,
    longest_prompt: int = 0,
) -> DecodeState:
    """Check the prompts, pad them and prefill. `longest_prompt` fixes the cache length for a whole stream."""
    check_prompts(model, prompts, settings.max_new_tokens)
    width = settings.draft_steps + 1
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    slots = bucket(bucket(max(longest_prompt, lengths.max())) + settings.max_new_tokens + width)
    return prefill(
        model.graphdef,
        model.decode_params,
        jnp.asarray(padded),
        jnp.asarray(lengths),
        jnp.asarray(lengths + settings.max_new_tokens),
        knobs.eos_ids,
        slots=slots,
        width=width,
        record=record,
    )


def check_prompts(model: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `UserError` for an empty batch or prompt, ids outside the vocabulary, or a context that is too short."""
    config = model.config
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("a prompt needs at least one token")
    for prompt in prompts:
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise UserError(f"prompt ids must be between 0 and {config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and {max_new_tokens} new ones were asked for;"
                f" the model's context holds {config.max_position_embeddings}"
            )


def read_generations(state: DecodeState, prompt_lengths: Sequence[int], eos_ids: tuple[int, ...]) -> list[Generation]:
    """Copy a finished batch to the host, once."""
    tokens, lengths, accept, drafted = jax.device_get((state.tokens, state.length, state.accept_lengths, state.drafted))
    generations = []
    for row, prompt_length in enumerate(prompt_lengths):
        ids = tokens[row, : lengths[row]].tolist()
        rounds = int((accept[row] > 0).sum())
        generations.append(
            Generation(
                output_ids=ids,
                new_ids=ids[prompt_length:],
                accept_lengths=accept[row, :rounds].tolist(),
                drafted=drafted[row, :rounds].tolist(),
                finish_reason="eos" if ids[-1] in eos_ids else "length",
            )
        )
    return generations
