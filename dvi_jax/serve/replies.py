"""Replies in OpenAI's shapes: whole objects and the chunks of a stream, for chats and for completions."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.stream import UNFINISHED
from dvi_jax.serve.requests import ReplyPiece, Statistics, TokenLogprob

# The engine's reasons in OpenAI's words.
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Choice:
    """A reply as it grows."""

    index: int
    text: str = ""
    finish_reason: str | None = None  # in OpenAI's words
    logprobs: list[TokenLogprob] = field(default_factory=list)
    characters: int = 0  # of the tokens whose log-probabilities were given

    def add(self, piece: ReplyPiece) -> None:
        """Take in what is new."""
        self.text += piece.text
        self.logprobs += piece.logprobs or ()
        if piece.finish_reason is not None:
            self.finish_reason = FINISH_REASONS.get(piece.finish_reason, piece.finish_reason)


class ReplyFormat(ABC):
    """The shape of one request's reply; `logprobs` says whether it has log-probabilities."""

    prefix: str  # of ids
    whole: str  # the object's name
    chunk: str  # the same for a part of a stream

    def __init__(self, model: str, tokenizer: Tokenizer | None, *, logprobs: bool):
        self.model, self.tokenizer, self.logprobs = model, tokenizer, logprobs
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def reply(self, choices: Sequence[Choice], about: dict[str, Any]) -> dict[str, Any]:
        """The whole reply; `about` has `usage` and the like."""
        return self._object(self.whole, [self._whole_choice(choice) for choice in choices]) | about

    def event(self, choices: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
        """A chunk of the stream."""
        return self._object(self.chunk, choices) | about

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def token_text(self, token: int) -> str:
        """A token's own text, special ones too; a part of a character reads as a replacement character."""
        return "" if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, None if it begins with text."""

    @abstractmethod
    def part(self, choice: Choice, piece: ReplyPiece) -> dict[str, Any]:
        """The choice of a chunk: what `piece` added to `choice`."""

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]: ...


class ChatFormat(ReplyFormat):
    """`/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, choice: Choice, piece: ReplyPiece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs or ()),
            "finish_reason": choice.finish_reason,
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            self._token(entry.token, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        # A token that is a part of a character has no text whose bytes these would be.
        content = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": content}


class CompletionFormat(ReplyFormat):
    """`/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> None:
        return None

    def part(self, choice: Choice, piece: ReplyPiece) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._logprobs(choice, piece.logprobs or ()),
            "finish_reason": choice.finish_reason,
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Parallel lists; offsets go on from chunk to chunk."""
        if not self.logprobs:
            return None
        tokens, offsets = [self.token_text(entry.token) for entry in entries], []
        for text in tokens:
            offsets.append(choice.characters)
            choice.characters += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._key(token): logprob for token, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _key(self, token: int) -> str:
        """A token's text; of parts of characters, which all read alike, the id."""
        text = self.token_text(token)
        return f"token_id:{token}" if UNFINISHED in text else text


def usage(prompt_tokens: int, replies: int, statistics: Sequence[Statistics]) -> dict[str, Any]:
    """Token counts of a request; a prompt counts once, however many `replies` it got."""
    new = sum(each.new_tokens for each in statistics)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in statistics[::replies])},
    }


def request_metrics(statistics: Sequence[Statistics]) -> dict[str, Any] | None:
    """What a request of one reply cost, under the names that vLLM gives these; None for several replies."""
    if len(statistics) != 1 or not statistics[0].first_token:
        return None
    (each,) = statistics
    generation = each.finished - each.first_token
    metrics: dict[str, Any] = {
        "queue_time_ms": 1e3 * (each.started - each.submitted),
        "time_to_first_token_ms": 1e3 * (each.first_token - each.started),
        "generation_time_ms": 1e3 * generation,
    }
    if each.new_tokens > 1:
        metrics["mean_itl_ms"] = 1e3 * generation / (each.new_tokens - 1)
        if generation > 0:
            metrics["tokens_per_second"] = (each.new_tokens - 1) / generation
    if each.rounds:
        metrics["speculative_decoding"] = {
            "mean_acceptance_length": 1 + each.accepted / each.rounds,
            "draft_acceptance_rate": each.accepted / each.drafted if each.drafted else None,
            "num_spec_steps": each.rounds,
            "num_draft_tokens": each.drafted,
            "num_accepted_draft_tokens": each.accepted,
        }
    return metrics
