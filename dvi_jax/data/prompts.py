"""From conversations to prompts, and the split between prompts to learn from and prompts kept apart.

The split is a hash of the conversation's first question. A question asked in two conversations is therefore
on the same side both times, wherever it stands in the stream, and so is every later turn that builds on it.
"""

from __future__ import annotations

import collections
import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dvi_jax.config import DataConfig
from dvi_jax.data.conversations import Conversation, ConversationStream, Message, StreamPosition
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError

TOO_LONG_PROMPT = "prompt too long"
REFUSED_BY_TEMPLATE = "refused by the chat template"
HELD_OUT = "held out"
HELD_OUT_SALT = "held-out"


@dataclass(frozen=True)
class Prompt:
    """Token ids [T] that end where the answer begins; the stream goes on at `position`, after this prompt.

    `log_ids` and `log_mask`: with `with_log`, the conversation up to the log's answer, answers marked; else empty.
    """

    ids: tuple[int, ...]
    conversation_id: str
    position: StreamPosition
    log_ids: tuple[int, ...] = ()
    log_mask: tuple[bool, ...] = ()


def is_held_out(question: str, fraction: float, salt: str) -> bool:
    """Whether a conversation opening with `question` is kept apart; case, blanks are ignored."""
    plain = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    digest = hashlib.blake2b(f"{salt}\0{plain}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class PromptStream:
    """Iterate, once, the prompts to train on; `counts` says what was left out and why.

    The `state()` (JSON) of an earlier stream resumes right after the last prompt it gave. Raises `UserError`
    at the end of a stream that gave no prompt at all.
    """

    def __init__(
        self,
        conversations: ConversationStream,
        tokenizer: Tokenizer,
        settings: DataConfig,
        *,
        system: str | None = None,
        with_log: bool = False,
        state: dict[str, Any] | None = None,
    ):
        """`settings`: which turns, how long, what is held out (its `files` are `conversations`').

        `system` replaces the conversations' own system messages; `with_log` keeps the log's answer to every prompt.
        """
        self.settings, self.system, self.with_log = settings, system, with_log
        self.position, self.given = conversations.start, 0
        self.counts: collections.Counter[str] = collections.Counter()
        if state is not None:
            self.position, self.given, self.counts = _parse_state(state)
            conversations = ConversationStream(conversations.paths, start=self.position, limits=conversations.limits)
        self.conversations = conversations
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[Prompt]:
        turn = self.conversations.start.turn
        for conversation in self.conversations:
            if self._is_held_out(conversation):
                self.counts[HELD_OUT] += 1
                self.position = conversation.position
            else:
                yield from self._train_prompts(conversation, turn)
            turn = 0
        if not self.given and self.conversations.start == StreamPosition():
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.counts.items()))
            limit = self.settings.max_prompt_tokens
            raise UserError(f"no prompt of at most {limit} tokens in {self.conversations.summary()} ({reasons})")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this stream (JSON): the position after the last prompt, the counts."""
        return {"position": self.position.to_json(), "given": self.given, "counts": dict(self.counts)}

    def held_out_prompts(self, n: int) -> list[Prompt]:
        """The first `n` different held-out prompts (fewer in a short stream), from the start of the files.

        Raises `UserError` for stdin, where reading ahead would take conversations away from training.
        """
        if not self.conversations.is_repeatable:
            raise UserError("held-out prompts cannot be taken from stdin: give a file of held-out conversations")
        found: dict[tuple[int, ...], Prompt] = {}
        stream = ConversationStream(self.conversations.paths, limits=self.conversations.limits)
        for conversation in stream:
            if len(found) >= n:
                break
            if self._is_held_out(conversation):
                for turn in self._turns(conversation):
                    prompt = self._prompt(conversation, turn)
                    if prompt == TOO_LONG_PROMPT:
                        break
                    if isinstance(prompt, Prompt):
                        found.setdefault(prompt.ids, prompt)
        return list(found.values())[:n]

    def _is_held_out(self, conversation: Conversation) -> bool:
        first = next(message for message in conversation.messages if message.role == "user")
        return is_held_out(first.content, self.settings.held_out_fraction, HELD_OUT_SALT)

    def _train_prompts(self, conversation: Conversation, first_turn: int) -> Iterator[Prompt]:
        turns = self._turns(conversation)[first_turn:]
        for turn in turns:
            prompt = self._prompt(conversation, turn)
            if prompt == TOO_LONG_PROMPT:  # a context grows with its turns, so the later ones are too long as well
                self.counts[prompt] += turns.stop - turn
                self.position = conversation.position
                return
            self.position = self._position_after(conversation, turn)
            if isinstance(prompt, Prompt):
                self.given += 1
                yield prompt
            else:
                self.counts[prompt] += 1

    def _turns(self, conversation: Conversation) -> range:
        """Indices of the user turns that become prompts."""
        users = sum(message.role == "user" for message in conversation.messages)
        return range(users if self.settings.turns == "all" else 1)

    def _position_after(self, conversation: Conversation, turn: int) -> StreamPosition:
        after = conversation.position
        is_last = turn == self._turns(conversation)[-1]
        return after if is_last else replace(after, record=after.record - 1, turn=turn + 1)

    def _prompt(self, conversation: Conversation, turn: int) -> Prompt | str:
        """The prompt of a user turn, or the reason why there is none."""
        messages = context_of_turn(conversation.messages, turn)
        try:
            ids = self._tokenizer.chat(messages, system=self.system)
        except TemplateRefusedError:
            return REFUSED_BY_TEMPLATE
        if len(ids) > self.settings.max_prompt_tokens:
            return TOO_LONG_PROMPT
        log_ids, log_mask = self._log(conversation, turn) if self.with_log else ((), ())
        return Prompt(tuple(ids), conversation.id, self._position_after(conversation, turn), log_ids, log_mask)

    def _log(self, conversation: Conversation, turn: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """The conversation up to the log's answer to user turn `turn`, if there is one."""
        asked = context_of_turn(conversation.messages, turn)
        following = from_first_question(conversation.messages)[len(asked) :]
        if not following or following[0].role != "assistant":
            return (), ()
        try:
            ids, mask = self._tokenizer.encode_conversation([*asked, following[0]], system=self.system)
        except TemplateRefusedError:
            return (), ()
        return tuple(ids), tuple(mask)


def from_first_question(messages: tuple[Message, ...]) -> list[Message]:
    """The whole conversation without an answer before the first question; a system message stays."""
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    return [*(m for m in messages[:first] if m.role == "system"), *messages[first:]]


def context_of_turn(messages: tuple[Message, ...], turn: int) -> list[Message]:
    """The messages up to and with user turn `turn`; an answer before the first question is left out."""
    kept = from_first_question(messages)
    users = [index for index, message in enumerate(kept) if message.role == "user"]
    return kept[: users[turn] + 1]


def _parse_state(state: dict[str, Any]) -> tuple[StreamPosition, int, collections.Counter[str]]:
    if not isinstance(state, dict) or set(state) != {"position", "given", "counts"}:
        raise UserError("the state of a prompt stream is an object with position, given and counts")
    position, given, counts = StreamPosition.from_json(state["position"]), state["given"], state["counts"]
    numbers = [given, *counts.values()] if isinstance(counts, dict) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError("the state of a prompt stream counts in whole numbers from 0")
    return position, given, collections.Counter(counts)
