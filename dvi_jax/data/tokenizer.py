"""Text to token ids and back, by the `tokenizers` library; conversations go through the chat template.

A conversation is rendered to one text and then tokenised, so a special token written in a message is that
special token, as in Hugging Face's `apply_chat_template`. Templates never see the clock: prompts stay the
same every day.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from dvi_jax.data.conversations import Message
from dvi_jax.data.template import ChatTemplate, TemplateRefusedError
from dvi_jax.errors import UserError

if TYPE_CHECKING:
    from dvi_jax.checkpoint import Checkpoint

MAX_GROWTH = 16  # how many times longer the replacements of a normalizer or decoder may make a text


class Tokenizer:
    """Tokenizer and chat template of one checkpoint; raises `UserError` for a damaged one.

    Without a chat template, a conversation reads "User: ...\\nAssistant: ...\\n" (and "System: ..." where
    there is a system message).
    """

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None = None,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
    ):
        self._tokenizer = load_tokenizer(tokenizer_json)
        self._shown: dict[int, bool] = {}  # of ids asked for
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        tokens = {
            "bos_token": self._text_of(bos_token_id),
            "eos_token": self._text_of(next(iter(eos_token_ids), None)),
        }
        self._template = ChatTemplate(chat_template, tokens) if chat_template is not None else None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer stored in a checkpoint; raises `UserError` where there is none."""
        if checkpoint.tokenizer_json is None:
            raise UserError(f"{checkpoint.path} has no tokenizer.json: import the model again from a complete source")
        return cls(
            checkpoint.tokenizer_json,
            checkpoint.chat_template,
            bos_token_id=checkpoint.config.bos_token_id,
            eos_token_ids=checkpoint.config.eos_token_ids,
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id: the fewest rows an embedding must have."""
        return largest_id(self._tokenizer) + 1

    def token_id(self, text: str) -> int | None:
        """The id of one token, None if there is no such token."""
        return self._tokenizer.token_to_id(text)

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids that are one byte of a character (byte fallback, as in Llama 2); decoding reads runs of them as UTF-8."""
        ids = (self.token_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in ids if token is not None)

    def is_shown(self, token: int) -> bool:
        """Whether decoding takes it in: it leaves out special tokens and ids without a token."""
        if token not in self._shown:
            is_known = 0 <= token < self.vocab_size and self._tokenizer.id_to_token(token) is not None
            is_special = self.decode([token]) != self.decode([token], skip_special_tokens=False)
            self._shown[token] = is_known and not is_special
        return self._shown[token]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; `add_special_tokens` adds what tokenizer.json puts around it (such as bos)."""
        return self._encode(text, add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not know are left out."""
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        with library_faults("the tokenizer cannot decode these tokens"):
            return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, system: str | None = None
    ) -> str:
        """The text of a conversation; `system` goes first unless the conversation has a system message."""
        if system is not None and not any(message.role == "system" for message in messages):
            messages = [Message("system", system), *messages]
        if self._template is not None:
            return self._template.render(messages, add_generation_prompt=add_generation_prompt)
        lines = [f"{message.role.capitalize()}: {message.content}\n" for message in messages]
        return "".join(lines) + ("Assistant:" if add_generation_prompt else "")

    def chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, system: str | None = None
    ) -> list[int]:
        """Token ids of a conversation, ready for the model to answer; raises `TemplateRefusedError`."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, system=system))

    def encode_conversation(
        self, messages: Sequence[Message], *, system: str | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether an assistant would have to write it.

        The mask covers answers with their end-of-turn token, not the template's blanks after it. Raises
        `TemplateRefusedError` for a template that writes a turn differently once another turn follows.
        """
        whole = self.render(messages, add_generation_prompt=False, system=system)
        spans = [
            self._answer_span(messages, index, whole, system)
            for index, message in enumerate(messages)
            if message.role == "assistant"
        ]
        encoding = self._encode(whole, add_special_tokens=False)
        mask = [any(start < last <= end for start, end in spans) for _, last in encoding.offsets]
        return encoding.ids, mask

    def _answer_span(self, messages: Sequence[Message], index: int, whole: str, system: str | None) -> tuple[int, int]:
        """Start and end of the answer `messages[index]` in `whole`."""
        before = self.render(messages[:index], add_generation_prompt=True, system=system)
        after = self.render(messages[: index + 1], add_generation_prompt=False, system=system).rstrip()
        if not (whole.startswith(after) and after.startswith(before.rstrip())):
            raise TemplateRefusedError("the chat template does not render turn by turn, so answers cannot be marked")
        return min(len(before), len(after)), len(after)

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")  # the library would put replacement characters in their place
        except UnicodeEncodeError:
            raise UserError("the text is not valid Unicode: it has lone surrogates") from None
        with library_faults("the tokenizer cannot encode this text"):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _text_of(self, token: int | None) -> str:
        is_known = token is not None and 0 <= token < self.vocab_size
        return (self._tokenizer.id_to_token(token) or "") if is_known else ""


def load_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, without truncation and padding; raises `UserError` for a damaged or hostile one."""
    try:
        description = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer.json is not valid JSON: {error}") from None
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise UserError("tokenizer.json must be an object with a model")
    with library_faults(f"tokenizer.json cannot be loaded by tokenizers {tokenizers.__version__}"):
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        tokenizer.no_truncation()  # some files ask for a cut at 512 tokens
        tokenizer.no_padding()
    for part in ("normalizer", "decoder"):
        if _growth(description.get(part)) > MAX_GROWTH:
            raise UserError(f"tokenizer.json: its {part} would make texts more than {MAX_GROWTH} times longer")
    return tokenizer


def largest_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The largest id that the tokenizer can give, of its vocabulary or put around a text; -1 if it has none."""
    with library_faults("tokenizer.json cannot be used"):
        around = tokenizer.encode("", add_special_tokens=True).ids
        return max((*tokenizer.get_vocab(with_added_tokens=True).values(), *around), default=-1)


@contextlib.contextmanager
def library_faults(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a `UserError` that begins with `what`.

    It raises nothing more special than `Exception`; its panics are a `BaseException` of a class it does not export.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {str(error)[:200]}") from None


def _growth(part: Any) -> int:
    """How many times longer the replacements in a part of tokenizer.json can make a text."""
    if isinstance(part, list):
        return math.prod(_growth(inner) for inner in part)
    if not isinstance(part, dict):
        return 1
    inserted = [len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str)]
    return max(*inserted, 1, 1) * math.prod(_growth(inner) for inner in part.values())
