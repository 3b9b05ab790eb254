"""Runs questions: each turn decoded plainly and speculatively, side by side in time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.batch import Generation, choose_plan, make_knobs, read_generations, slots_for, start
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.memory import Sizes, measure_memory
from dvi_jax.decode.plan import PLAIN as PLAIN_PLAN
from dvi_jax.decode.plan import Option, rows_alike
from dvi_jax.decode.prefill import bucket
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.evaluate.spec_bench import Question
from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE, Trace, Turn
from dvi_jax.loading import LoadedModel

TOO_LONG = "prompt and new tokens exceed the model's context"
REFUSED = "refused by the chat template"
NO_TOKENIZER = "this checkpoint has no tokenizer, which questions need: import the model with one"
EARLIER_TURN = "an earlier turn was skipped"


@dataclass(frozen=True)
class Skipped:
    """A turn that was not asked, and why."""

    question_id: int | str
    turn: int
    reason: str


@dataclass(frozen=True)
class TimedGeneration:
    """A generation and what it took."""

    generation: Generation
    cache_slots: int
    prefill_seconds: float
    seconds: float


@dataclass(frozen=True)
class Answered:
    """What came of one question: the turns measured, the model's answers to them, the turns left out."""

    question: Question
    turns: list[Turn]
    texts: list[str]
    skipped: list[Skipped]

    def add(self, number: int, prompt: Sequence[int], timed: dict[str, TimedGeneration], tokenizer: Tokenizer) -> None:
        """Turn `number` was answered in every mode; the modes in the order in which they ran."""
        traces = {mode: _trace(self.question, number, prompt, mode, timed) for mode in timed}
        self.turns.append(Turn(traces[PLAIN], traces[SPECULATIVE], traces.get(FASTEST)))
        self.texts.append(tokenizer.decode(traces[SPECULATIVE].new_ids))

    def skip_from(self, number: int, reason: str) -> None:
        """Turn `number` cannot be asked, and so none behind it."""
        self.skipped.append(Skipped(self.question.question_id, number, reason))
        later = range(number + 1, len(self.question.turns))
        self.skipped.extend(Skipped(self.question.question_id, turn, EARLIER_TURN) for turn in later)


class Decoder(Protocol):
    """What holds conversations, and measures each of their turns in every mode."""

    model: LoadedModel
    settings: DecodeConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises `UserError` where the checkpoint has none."""

    def run(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Hold every conversation."""


class PairedDecoder:
    """Decodes a prompt plainly and speculatively, at batch 1, in verifying passes of one row class.

    And plainly one row wide, where that is another class: the fastest plain decoding. Cache slots follow the prompt's
    bucket, so a stream of prompts needs a handful of programs. Each is compiled and run once before anything is timed.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: DecodeConfig,
        memory_limit: int | None = None,
        chooser: PlanChooser | None = None,
    ):
        """`memory_limit`: bytes; a prompt whose caches do not fit raises `UserError` with the numbers.

        `chooser` chooses how to draft; without one the settings say it.
        """
        self.model, self.settings, self._limit, self._chooser = model, settings, memory_limit, chooser
        self._alike = rows_alike(settings.width, model.config, model.manifest.dtype)
        self._programs: dict[tuple[Option, int], Any] = {}  # by plan, width and cache slots
        self._warm: set[tuple[Option, int]] = set()  # by plan, width and prompt bucket

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises `UserError` where the checkpoint has none."""
        return self.model.need_tokenizer(NO_TOKENIZER)

    def decode(self, prompt: Sequence[int], turn: int) -> dict[str, TimedGeneration]:
        """The prompt decoded in every mode, by mode, one right after the other; `turn` says which goes first."""
        modes = self._modes()
        needed = [(option, mode != SPECULATIVE) for mode, option in modes.items()]
        if self._chooser is not None:
            needed += [(option, False) for option in self._chooser.alternatives(modes[SPECULATIVE])]
        # All programs are counted before any lies on the device.
        for option in {option: None for option, _ in needed}:
            self._count(prompt, option)
        for option, plain in needed:
            self._warm_up(prompt, option, plain=plain)
        order = [*modes][turn % len(modes) :] + [*modes][: turn % len(modes)]
        return {mode: self._decode(prompt, mode, modes[mode]) for mode in order}

    def run(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Hold every conversation, one question after the other; the mode that goes first changes from turn to turn."""
        for index, question in enumerate(questions):
            yield hold_conversation(self, question, index)

    def _modes(self) -> dict[str, Option]:
        """How each mode decodes the next prompt."""
        if self._chooser is None:
            option = Option(choose_plan(self.model, self.settings), self.settings.width)
        else:
            option = self._chooser.begin()
        plain = choose_plan(self.model, option.settings(self.settings), plain=True)
        is_fastest = option.width == 1 or (self._alike and plain == PLAIN_PLAN)
        narrow = {} if is_fastest else {FASTEST: Option(PLAIN_PLAN, 1)}
        return {PLAIN: Option(plain, option.width), **narrow, SPECULATIVE: option}

    def _decode(self, prompt: Sequence[int], mode: str, option: Option) -> TimedGeneration:
        began = time.perf_counter()
        state, knobs = self._start(prompt, option, plain=mode != SPECULATIVE)
        prefilled = time.perf_counter()
        slots = state.tokens.shape[1]
        decoding = time.perf_counter()
        if mode == SPECULATIVE and self._chooser is not None:
            state = jax.block_until_ready(self._chooser.decode(state, knobs, option))
        else:
            state = jax.block_until_ready(self._programs[option, slots](self.model.decode_params, state, knobs))
        ended = time.perf_counter()
        (generation,) = read_generations(state, [len(prompt)], self.model.eos_ids)
        return TimedGeneration(generation, slots, prefilled - began, ended - decoding)

    def _start(self, prompt: Sequence[int], option: Option, *, plain: bool) -> tuple[DecodeState, Knobs]:
        settings = option.settings(self.settings)
        knobs = make_knobs(settings, self.model.eos_ids, plain=plain)
        return jax.block_until_ready(start(self.model, [prompt], settings, knobs)), knobs

    def _count(self, prompt: Sequence[int], option: Option) -> None:
        """`UserError` where the programs of this prompt's bucket do not fit."""
        padded, settings = bucket(len(prompt)), option.settings(self.settings)
        if (option, padded) not in self._warm:
            sizes = Sizes(1, slots_for(len(prompt), settings), option.width, padded, plan=option.plan)
            measure_memory(self.model, sizes, self._limit)

    def _warm_up(self, prompt: Sequence[int], option: Option, *, plain: bool) -> None:
        """Compile what this prompt's bucket needs, and run a few rounds: first runs allocate and record graphs."""
        padded = bucket(len(prompt))
        if (option, padded) in self._warm:
            return
        state, knobs = self._start(prompt, option, plain=plain)
        slots = state.tokens.shape[1]
        program = (self.model.definition, self.model.decode_params)
        if (option, slots) not in self._programs:
            self._programs[option, slots] = decode_rounds.lower(*program, state, knobs, option.plan).compile()
        few = state.replace(limit=jnp.minimum(state.limit, state.length + 3 * option.width))
        jax.block_until_ready(self._programs[option, slots](self.model.decode_params, few, knobs))
        if self._chooser is not None and not plain:  # it calls the program, which jax then finds compiled
            state, knobs = self._start(prompt, option, plain=plain)
            jax.block_until_ready(decode_rounds(*program, state, knobs, option.plan))
        self._warm.add((option, padded))


def first_prompt(decoder: Decoder, questions: Sequence[Question]) -> list[int]:
    """The first prompt that can be asked; raises `UserError` where no conversation could be begun."""
    reason = ""
    for question in questions:
        prompt = conversation_prompt(decoder, [Message("user", question.turns[0])])
        if not isinstance(prompt, str):
            return prompt
        reason = reason or prompt
    raise UserError(f"none of the {len(questions)} questions can be asked; the first: {reason}")


def hold_conversation(decoder: PairedDecoder, question: Question, index: int) -> Answered:
    """Ask the turns of question number `index` in order.

    A later prompt holds the model's own earlier answers, the same for every mode.
    """
    answered = Answered(question, [], [], [])
    messages: list[Message] = []
    for number, text in enumerate(question.turns):
        messages.append(Message("user", text))
        prompt = conversation_prompt(decoder, messages)
        if isinstance(prompt, str):
            answered.skip_from(number, prompt)
            break
        answered.add(number, prompt, decoder.decode(prompt, index + number), decoder.tokenizer)
        messages.append(Message("assistant", answered.texts[-1]))
    return answered


def conversation_prompt(decoder: Decoder, messages: Sequence[Message]) -> list[int] | str:
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
