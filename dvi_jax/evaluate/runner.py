"""Runs questions: each turn decoded plainly and speculatively by one compiled program, side by side in time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.batch import Generation, choose_plan, make_knobs, read_generations, slots_for, start
from dvi_jax.decode.memory import Sizes, measure_memory
from dvi_jax.decode.prefill import bucket
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState
from dvi_jax.errors import UserError
from dvi_jax.evaluate.spec_bench import Question
from dvi_jax.evaluate.trace import PLAIN, SPECULATIVE, Trace, Turn
from dvi_jax.loading import LoadedModel

TOO_LONG = "prompt and new tokens exceed the model's context"
REFUSED = "refused by the chat template"
EARLIER_TURN = "an earlier turn was skipped"


@dataclass(frozen=True)
class Skipped:
    """A turn that was not asked, and why."""

    question_id: int | str
    turn: int
    reason: str


@dataclass(frozen=True)
class Answered:
    """What came of one question: the turns measured, the model's answers to them, the turns left out."""

    question: Question
    turns: list[Turn]
    texts: list[str]
    skipped: list[Skipped]


@dataclass(frozen=True)
class TimedGeneration:
    """A generation and what it took."""

    generation: Generation
    cache_slots: int
    prefill_seconds: float
    seconds: float


class PairedDecoder:
    """Decodes a prompt in either mode, at batch 1, with verifying passes of one row class.

    Cache slots follow the prompt's bucket, so a stream of prompts needs a handful of programs. Each is compiled and
    run once before anything is timed.
    """

    def __init__(self, model: LoadedModel, settings: DecodeConfig, memory_limit: int | None = None):
        """`memory_limit`: bytes; a prompt whose caches do not fit raises `UserError` with the numbers."""
        self.model, self.settings, self._limit = model, settings, memory_limit
        self._knobs = {mode: make_knobs(settings, model.eos_ids, plain=mode == PLAIN) for mode in (PLAIN, SPECULATIVE)}
        self._plans = {mode: choose_plan(model, settings, plain=mode == PLAIN) for mode in (PLAIN, SPECULATIVE)}
        self._programs: dict[tuple[str, int], Any] = {}  # by mode and cache slots
        self._warm: set[int] = set()  # prompt buckets

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises `UserError` where the checkpoint has none."""
        return self.model.need_tokenizer(
            "this checkpoint has no tokenizer, which questions need: import the model with one"
        )

    def both(self, prompt: Sequence[int], *, plain_first: bool) -> dict[str, TimedGeneration]:
        """The prompt decoded in both modes, by mode, in the order asked for."""
        self._warm_up(prompt)
        order = (PLAIN, SPECULATIVE) if plain_first else (SPECULATIVE, PLAIN)
        return {mode: self._decode(prompt, mode) for mode in order}

    def _decode(self, prompt: Sequence[int], mode: str) -> TimedGeneration:
        began = time.perf_counter()
        state = self._start(prompt, mode)
        prefilled = time.perf_counter()
        slots = state.tokens.shape[1]
        program = self._programs[mode, slots]
        decoding = time.perf_counter()
        state = jax.block_until_ready(program(self.model.decode_params, state, self._knobs[mode]))
        ended = time.perf_counter()
        (generation,) = read_generations(state, [len(prompt)], self.model.eos_ids)
        return TimedGeneration(generation, slots, prefilled - began, ended - decoding)

    def _start(self, prompt: Sequence[int], mode: str) -> DecodeState:
        return jax.block_until_ready(start(self.model, [prompt], self.settings, self._knobs[mode]))

    def _warm_up(self, prompt: Sequence[int]) -> None:
        """Compile what this prompt's bucket needs, and run a few rounds: first runs allocate and record graphs."""
        padded = bucket(len(prompt))
        if padded in self._warm:
            return
        measure_memory(
            self.model,
            Sizes(1, slots_for(len(prompt), self.settings), self.settings.width, padded, plan=self._plans[SPECULATIVE]),
            self._limit,
        )
        for mode, knobs in self._knobs.items():
            state = self._start(prompt, mode)
            slots = state.tokens.shape[1]
            if (mode, slots) not in self._programs:
                self._programs[mode, slots] = decode_rounds.lower(
                    self.model.definition, self.model.decode_params, state, knobs, self._plans[mode]
                ).compile()
            few = state.replace(limit=jnp.minimum(state.limit, state.length + 3 * self.settings.width))
            jax.block_until_ready(self._programs[mode, slots](self.model.decode_params, few, knobs))
        self._warm.add(padded)


def run_questions(decoder: PairedDecoder, questions: Sequence[Question]) -> Iterator[Answered]:
    """Hold every conversation, one question after the other; which mode goes first alternates."""
    for index, question in enumerate(questions):
        yield hold_conversation(decoder, question, plain_first=index % 2 == 0)


def first_prompt(decoder: PairedDecoder, questions: Sequence[Question]) -> list[int]:
    """The first prompt that can be asked; raises `UserError` where no conversation could be begun."""
    reason = ""
    for question in questions:
        prompt = conversation_prompt(decoder, [Message("user", question.turns[0])])
        if not isinstance(prompt, str):
            return prompt
        reason = reason or prompt
    raise UserError(f"none of the {len(questions)} questions can be asked; the first: {reason}")


def hold_conversation(decoder: PairedDecoder, question: Question, *, plain_first: bool) -> Answered:
    """Ask the turns in order; a later prompt holds the model's own earlier answers, the same for both modes."""
    answered = Answered(question, [], [], [])
    messages: list[Message] = []
    for number, text in enumerate(question.turns):
        messages.append(Message("user", text))
        prompt = conversation_prompt(decoder, messages)
        if isinstance(prompt, str):
            answered.skipped.append(Skipped(question.question_id, number, prompt))
            later = range(number + 1, len(question.turns))
            answered.skipped.extend(Skipped(question.question_id, turn, EARLIER_TURN) for turn in later)
            break
        timed = decoder.both(prompt, plain_first=plain_first == (number % 2 == 0))
        traces = {mode: _trace(question, number, prompt, mode, timed) for mode in (PLAIN, SPECULATIVE)}
        answered.turns.append(Turn(traces[PLAIN], traces[SPECULATIVE]))
        answered.texts.append(decoder.tokenizer.decode(traces[SPECULATIVE].new_ids))
        messages.append(Message("assistant", answered.texts[-1]))
    return answered


def conversation_prompt(decoder: PairedDecoder, messages: Sequence[Message]) -> list[int] | str:
    """The prompt that asks for the next answer, or the reason why it cannot be asked."""
    try:
        prompt = decoder.tokenizer.chat(messages)
    except TemplateRefusedError:
        return REFUSED
    room = decoder.model.config.context_length - decoder.settings.max_new_tokens
    return TOO_LONG if len(prompt) > room else prompt


def _trace(question: Question, turn: int, prompt: Sequence[int], mode: str, timed: dict[str, TimedGeneration]) -> Trace:
    this = timed[mode]
    return Trace(
        question_id=question.question_id,
        category=question.category,
        turn=turn,
        mode=mode,
        ran_first=mode == next(iter(timed)),
        prompt_tokens=len(prompt),
        cache_slots=this.cache_slots,
        drafted=this.generation.drafted,
        accept_lengths=this.generation.accept_lengths,
        new_ids=this.generation.new_ids,
        finish_reason=this.generation.finish_reason,
        prefill_seconds=this.prefill_seconds,
        seconds=this.seconds,
    )
