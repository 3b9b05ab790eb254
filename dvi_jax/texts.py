"""Texts in, texts out: prompts as people have them, and `generate_text`, the whole of decoding in one call."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.conversations import Message
from dvi_jax.decode.batch import Generation, check_prompts, generate_batch
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.plan import Plan, drafts_of
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel

ROLES = ("system", "user", "assistant")

# A user message, token ids, or a conversation.
Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    text: str  # "" where the model has no tokenizer
    generation: Generation  # ids, accept lengths, and why it ended


def generate_text(
    model: LoadedModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    plain: bool = False,
    stop: Sequence[str] = (),
    eos_ids: tuple[int, ...] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continue each prompt: a string is a user message, a list of messages a conversation, a list of ints token ids.

    `settings` are the fields of `DecodeConfig` (`max_new_tokens=64`, `plan="tree:16"`) and `SamplingConfig`
    (`temperature=0.8`, `seed=1`); decoding is greedy unless a temperature is given. `plain` drafts nothing; otherwise
    it drafts as `plan` and `draft_steps` say, or as `usual_drafting`. Sequence b of several takes `seed + b`.
    Raises `UserError` for an unknown setting, naming the nearest one, and for a prompt that cannot be.
    """
    decode, sampling = _settings(settings)
    if not plain and not {"plan", "draft_steps"} & settings.keys():
        decode = usual_drafting(model, decode)
    ids = [prompt_ids(model, prompt) for prompt in _as_list(prompts)]
    generations, texts, _ = decode_texts(model, ids, decode, plain=plain, eos_ids=eos_ids, sampling=sampling, stop=stop)
    return [Completion(text, generation) for text, generation in zip(texts, generations, strict=True)]


def usual_drafting(model: LoadedModel, settings: DecodeConfig) -> DecodeConfig:
    """`settings`, drafting as the drafter did in training; an untrained one drafts nothing, as it slows decoding down.

    Where its training recorded nothing, the number of drafts is that of `settings`.
    """
    if not model.drafter_is_trained:
        return dataclasses.replace(settings, plan="plain", draft_steps=0)
    plan, draft_steps = model.manifest.plan, model.manifest.draft_steps or settings.draft_steps
    if plan:
        return dataclasses.replace(settings, plan=plan, draft_steps=drafts_of(Plan.parse(plan)))
    return dataclasses.replace(settings, plan=None, draft_steps=draft_steps)


class Decoding(TypedDict, total=False):
    """What `generate_batch` and `Stream` both take, as they say."""

    plain: bool
    eos_ids: tuple[int, ...] | None
    sampling: SamplingConfig | Sequence[SamplingConfig] | None


def decode_texts(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodeConfig,
    *,
    stop: Sequence[str] = (),
    chooser: PlanChooser | None = None,
    **decoding: Unpack[Decoding],
) -> tuple[list[Generation], list[str], float]:
    """The continuations of token ids as one batch, their texts, and the seconds of decoding; stop strings end them."""
    if not stop:
        generations, seconds = generate_batch(model, prompts, settings, chooser=chooser, **decoding)
        tokenizer = model.tokenizer
        return generations, [tokenizer.decode(g.new_ids) if tokenizer else "" for g in generations], seconds
    if chooser is not None:
        settings = chooser.begin().settings(settings)
    stream = Stream(model, prompts, settings, stop=stop, **decoding)
    texts, began = [""] * len(prompts), time.perf_counter()
    for pieces in stream:
        for piece in pieces:
            texts[piece.sequence] += piece.text
    return stream.generations, texts, time.perf_counter() - began


def prompt_ids(model: LoadedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; a text or a conversation goes through the chat template."""
    if not isinstance(prompt, str) and all(type(token) is int for token in prompt):
        check_prompts(model, [list(prompt)], 0)  # type: ignore[arg-type]  # all are int
        return list(prompt)  # type: ignore[arg-type]
    tokenizer = model.need_tokenizer("this checkpoint has no tokenizer: give token ids")
    return tokenizer.chat([Message("user", prompt)] if isinstance(prompt, str) else as_messages(prompt))


def as_messages(values: object) -> list[Message]:
    """Messages or `{"role": .., "content": ..}` as messages; `UserError` for anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"a conversation is a list of messages, got {values!r:.80}")
    return [value if isinstance(value, Message) else _message(value) for value in values]


def _message(value: object) -> Message:
    if not isinstance(value, Mapping) or value.keys() != {"role", "content"}:
        raise UserError(f"a message has a role and a content, got {value!r:.80}")
    role, content = value["role"], value["content"]
    if role not in ROLES or not isinstance(content, str):
        raise UserError(f"a message has a role ({', '.join(ROLES)}) and a text as content, got {value!r:.80}")
    return Message(role, content)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as several: a list of ints or of messages is one."""
    if isinstance(prompts, str):
        return [prompts]
    if all(isinstance(part, int | Message | Mapping) for part in prompts):
        return [prompts] if prompts else []  # type: ignore[list-item]  # one prompt
    return list(prompts)  # type: ignore[arg-type]


def _settings(settings: Mapping[str, Any]) -> tuple[DecodeConfig, SamplingConfig | None]:
    """What the keywords come to: settings of decoding, and of sampling where any are given."""
    decode, sampling = ({field.name for field in dataclasses.fields(kind)} for kind in (DecodeConfig, SamplingConfig))
    for name in settings:
        if name not in decode | sampling:
            near = difflib.get_close_matches(name, decode | sampling, 1, 0.5)
            raise UserError(f"unknown setting {name!r}" + (f": did you mean {near[0]}?" if near else ""))
    drawn = {name: value for name, value in settings.items() if name in sampling}
    if "temperature" not in drawn:
        drawn["temperature"] = 0.0
    is_greedy = not drawn["temperature"] and "repetition_penalty" not in drawn
    chosen = DecodeConfig(**{name: value for name, value in settings.items() if name in decode})
    return chosen, None if is_greedy else SamplingConfig(**drawn)
