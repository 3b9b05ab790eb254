"""Text to token ids and back, by the `tokenizers` library; conversations go through the chat template.

A conversation is rendered to one text and then tokenised, so a special token written in a message is that
special token, as in Hugging Face's `apply_chat_template`. Templates never see the clock: prompts stay the
same every day.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers

from dvi_jax.data.conversations import Message
from dvi_jax.data.template import ChatTemplate, TemplateRefusedError
from dvi_jax.data.tokenizer_file import SYMBOL_MARK, largest_id, library_faults, read_tokenizer
from dvi_jax.errors import UserError

if TYPE_CHECKING:
    from dvi_jax.checkpoint import Checkpoint

LONG_TEXT = 20_000  # characters from which on other threads should not wait for the tokenizer


class Tokenizer:
    """Tokenizer and chat template of one checkpoint; raises `UserError` for a damaged tokenizer.

    A template is started where it is used, so a bad one is no obstacle to token ids. Without one, a conversation
    reads "User: ...\\nAssistant: ...\\n" (and "System: ..." where there is a system message), between the special
    tokens that the tokenizer puts around a text. `special_tokens` are the template's variables such as `eos_token`,
    which are else the texts of the ids.
    """

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None = None,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ):
        file = read_tokenizer(tokenizer_json)
        self._tokenizer, self._special_ids = file.tokenizer, file.special_ids
        self._shown: dict[int, bool] = {}  # of ids asked for
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        tokens = {
            "bos_token": self._text_of(bos_token_id),
            "eos_token": self._text_of(next(iter(eos_token_ids), None)),
            **(special_tokens or {}),
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
            special_tokens=checkpoint.special_tokens,
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id: the fewest rows an embedding must have."""
        return largest_id(self._tokenizer) + 1

    def token_id(self, text: str) -> int | None:
        """The id of one token, None if there is no such token; `UserError` for what is not valid Unicode."""
        _check_unicode(text)
        index = self._tokenizer.token_to_id(text)
        return self._tokenizer.token_to_id(SYMBOL_MARK + text) if index is None else index

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
        left_out = self._special_ids if skip_special_tokens else frozenset()
        known = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in left_out]
        with library_faults("the tokenizer cannot decode these tokens"):
            return self._tokenizer.decode(known, skip_special_tokens=False)

    def template_fault(self) -> str | None:
        """Why the chat template does not take a single user message; None if it does, or if there is none."""
        return None if self._template is None else self._template.fault()

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
        text = self.render(messages, add_generation_prompt=add_generation_prompt, system=system)
        return self._encode_rendered(text).ids

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
        encoding = self._encode_rendered(whole)
        mask = [any(start < last <= end for start, end in spans) for _, last in encoding.offsets]
        return encoding.ids, mask

    def _answer_span(self, messages: Sequence[Message], index: int, whole: str, system: str | None) -> tuple[int, int]:
        """Start and end of the answer `messages[index]` in `whole`."""
        before = self.render(messages[:index], add_generation_prompt=True, system=system)
        after = self.render(messages[: index + 1], add_generation_prompt=False, system=system).rstrip()
        if not (whole.startswith(after) and after.startswith(before.rstrip())):
            raise TemplateRefusedError("the chat template does not render turn by turn, so answers cannot be marked")
        return min(len(before), len(after)), len(after)

    def _encode_rendered(self, text: str) -> tokenizers.Encoding:
        """A template writes the special tokens that belong around a text itself."""
        return self._encode(text, add_special_tokens=self._template is None)

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        _check_unicode(text)
        with library_faults("the tokenizer cannot encode this text"):
            if len(text) < LONG_TEXT:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            # Seconds for megabytes: as a batch, the library lets Python's other threads run meanwhile.
            return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _text_of(self, token: int | None) -> str:
        is_known = token is not None and 0 <= token < self.vocab_size
        return (self._tokenizer.id_to_token(token) or "") if is_known else ""


def _check_unicode(text: str) -> None:
    """The library would put replacement characters in the place of what no text can hold, or fail."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the text is not valid Unicode: it has lone surrogates") from None
