"""What clients may ask for: the fields of OpenAI's requests, as vLLM and llama.cpp extend them.

Types are strict (no number in a text), unknown fields are ignored, and fields that would change the reply if they were
heeded are refused by name (`NOT_HERE`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dvi_jax.data.conversations import Message
from dvi_jax.serve.refusals import RefusedError

MOST_INT32 = 2**31 - 1

# Fields that this server lacks, and the values with which they ask for nothing.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({},),
    "guided_regex": ("",),
    "json_schema": (),
    "length_penalty": (1,),
    "logit_bias": ({}, []),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class Body(BaseModel):
    """A request's JSON object."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None  # None: the one that is served

    def refuse_what_is_not_here(self) -> None:
        """Raise `RefusedError` for a field of `NOT_HERE` that asks for something."""
        for name, value in (self.model_extra or {}).items():
            if name in NOT_HERE and value is not None and value not in NOT_HERE[name]:
                raise RefusedError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_field")


class StreamOptions(BaseModel):
    """What a stream holds besides the reply."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None  # a last chunk with the token counts


class GenerationBody(Body):
    """What both ways of asking for a reply have in common; None is the default everywhere."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)  # replies to each prompt
    max_tokens: int | None = Field(None, ge=1, le=MOST_INT32)  # of a reply
    temperature: float | None = Field(None, ge=0, le=2)  # default 1; 0 is greedy
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MOST_INT32)  # 0 or -1: all tokens
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)  # used modulo 2**32; None: a new one each time
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None  # whether the end-of-sequence token ends nothing
    store: bool | None = None  # false: the drafter does not learn from it

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 16 or not all(0 < len(stop) <= 1000 for stop in stops):
            raise RefusedError(400, "stop: at most 16 texts of 1 to 1000 characters", param="stop")
        return stops


class TextPart(BaseModel):
    """A piece of a message; only texts are understood."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def turn(self) -> Message:
        """As the chat template takes it."""
        for name in ("tool_calls", "function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise RefusedError(400, f"messages: {name} is not supported", param="messages")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatBody(GenerationBody):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_INT32)  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)  # alternatives to give with each token


class CompletionBody(GenerationBody):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)  # alternatives to give with each token


class TokenizeBody(Body):
    """`/tokenize`: a text, or a conversation put through the chat template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=10_000)
    add_special_tokens: bool = True  # around a text; a template writes its own


class DetokenizeBody(Body):
    """`/detokenize`: token ids, read with their special tokens."""

    tokens: list[int]
