"""From a body's bytes to what the engine is asked: parsing, the chat template, token ids. Runs off the event loop."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from pydantic import ValidationError

from dvi_jax.config import SamplingConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.serve.refusals import RefusedError, invalid
from dvi_jax.serve.requests import Request
from dvi_jax.serve.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody

AnyBody = TypeVar("AnyBody", bound=Body)
Value = TypeVar("Value")

COMPLETION_TOKENS = 16  # of a completion that names no limit, as OpenAI has it
COLDEST = 1e-5  # lower temperatures are greedy: dividing logits by them overflows


@dataclass(frozen=True)
class Served:
    """The model as requests see it."""

    name: str  # as clients call it
    tokenizer: Tokenizer | None
    context: int  # tokens, prompt included, that a request may have
    max_choices: int  # replies that one request may ask for

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; `RefusedError` where the model has none."""
        if self.tokenizer is None:
            raise RefusedError(400, "this model has no tokenizer: send a prompt of token ids to /v1/completions")
        return self.tokenizer


@dataclass(frozen=True)
class Prepared:
    """A request, ready for the engine."""

    choices: tuple[Request, ...]  # one for each reply, in the order of their index
    replies: int  # to each prompt
    prompt_tokens: int  # of all prompts, each counted once
    stream: bool
    include_usage: bool  # as the last event of a stream


def prepare_chat(content: bytes, served: Served) -> Prepared:
    """Of a body of `/v1/chat/completions`; raises `RefusedError`, or `UserError` from the template or the tokenizer."""
    body = _parsed(ChatBody, content, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tokenizer = served.need_tokenizer()
    ids = tokenizer.chat([message.turn() for message in body.messages])
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _prepared(body, [ids], limit, logprobs, served)


def prepare_completion(content: bytes, served: Served) -> Prepared:
    """The same for `/v1/completions`."""
    body = _parsed(CompletionBody, content, served)
    prompts = _prompts(body.prompt)
    if len(prompts) > served.max_choices:
        raise RefusedError(400, f"prompt: at most {served.max_choices} prompts, got {len(prompts)}", param="prompt")
    ids = [
        served.need_tokenizer().encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _prepared(body, ids, limit, body.logprobs, served)


def tokenize(content: bytes, served: Served) -> dict[str, object]:
    """The answer to `/tokenize`."""
    body, tokenizer = _parsed(TokenizeBody, content, served), served.need_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError(400, "send either prompt or messages", param="prompt")
    if body.messages is not None:
        ids = tokenizer.chat([message.turn() for message in body.messages])
    else:
        ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


def detokenize(content: bytes, served: Served) -> dict[str, object]:
    """The answer to `/detokenize`."""
    body = _parsed(DetokenizeBody, content, served)
    return {"prompt": served.need_tokenizer().decode(body.tokens, skip_special_tokens=False)}


def _parsed(kind: type[AnyBody], content: bytes, served: Served) -> AnyBody:
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise invalid(error) from error
    if body.model not in (None, served.name):
        message = f"the model {body.model[:100]!r} does not exist here: {served.name!r} is served"
        raise RefusedError(404, message, param="model", code="model_not_found")
    body.refuse_what_is_not_here()
    return body


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One entry for each prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RefusedError(400, "prompt: the list is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return cast(list[str | list[int]], prompt)


def _prepared(
    body: GenerationBody, prompts: Sequence[Sequence[int]], limit: int | None, logprobs: int | None, served: Served
) -> Prepared:
    """One engine request for each prompt and reply; `limit` is the most new tokens, None for as many as fit."""
    replies, sampling = body.n or 1, _sampling(body)
    if len(prompts) * replies > served.max_choices:
        message = f"n: at most {served.max_choices} replies, asked for are {replies} to each of {len(prompts)} prompts"
        raise RefusedError(400, message, param="n")
    choices = []
    for ids in prompts:
        base = Request(
            tuple(ids),
            _new_tokens(len(ids), limit, served.context),
            eos_ids=() if body.ignore_eos else None,
            stop=body.stops,
            logprobs=logprobs,
            learn=body.store is not False,
        )
        # Replies to one prompt have consecutive seeds, so that each can be asked for again alone.
        for reply in range(replies):
            seeded = sampling and replace(sampling, seed=(sampling.seed + reply) % 2**32)
            choices.append(replace(base, sampling=seeded))
    options = body.stream_options
    usage = bool(options and options.include_usage)
    return Prepared(tuple(choices), replies, sum(map(len, prompts)), bool(body.stream), usage)


def _new_tokens(prompt: int, limit: int | None, context: int) -> int:
    """The most new tokens of a reply; raises `RefusedError` where prompt and reply do not fit the context."""
    if prompt == 0:
        raise RefusedError(400, "the prompt is empty", param="prompt")
    if prompt + (limit or 1) > context:
        asked = f" and {limit} new ones were asked for" if limit else ""
        message = f"the prompt has {prompt} tokens{asked}: this server's context is {context} tokens"
        raise RefusedError(
            400, message, param="max_tokens" if prompt < context else None, code="context_length_exceeded"
        )
    return context - prompt if limit is None else limit


def _sampling(body: GenerationBody) -> SamplingConfig | None:
    """How replies are sampled, None for greedy ones; without a seed, with a new one."""
    defaults = SamplingConfig()

    temperature = _given(body.temperature, defaults.temperature)
    if temperature < COLDEST:
        temperature = 0.0
    penalty = _given(body.repetition_penalty, defaults.repetition_penalty)
    if temperature == 0 and penalty == 1:
        return None
    return SamplingConfig(
        temperature=temperature,
        top_k=max(_given(body.top_k, 0), 0),
        top_p=_given(body.top_p, defaults.top_p),
        min_p=_given(body.min_p, defaults.min_p),
        repetition_penalty=penalty,
        seed=(secrets.randbits(32) if body.seed is None else body.seed) % 2**32,
    )


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def as_refusal(error: UserError) -> RefusedError:
    """400 for what the template, the tokenizer or the engine say of a request."""
    return error if isinstance(error, RefusedError) else RefusedError(400, str(error))
