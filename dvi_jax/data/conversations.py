"""Streams of conversations: what a usable conversation is, what is skipped and why, and where to go on later.

Every position can be resumed. Files are read again from the beginning up to the position (125 MB take about a
second): that also restores the counts and the ids already seen, so a resumed stream is equal to the tail of
one that was never interrupted. What came from stdin or another pipe is gone: a resumed stream takes what it
brings next and counts on.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvi_jax.data.records import INVALID_UTF8, NOT_AN_OBJECT, TOO_LONG, Damaged, RecordReader
from dvi_jax.data.sources import CUT_OFF, STDIN, ByteSource
from dvi_jax.errors import UserError

MISSING_FIELD = "missing field"
CUT_SHORT = "cut short at "  # how a reason begins that did not cost the whole conversation
WRONG_TYPE = "wrong type"
WRONG_ROLE = "wrong role"
EMPTY = "empty"
NO_USER_MESSAGE = "no user message"
DUPLICATE = "duplicate id"  # or the same messages as in another file

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Turns with a tool, by whichever side: what they say is no text between a user and an assistant.
TOOL_ROLES = {
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "observation", "environment"),
    *("function", "function_call", "function-call", "function_response", "function-response", "ipython"),
}
_CALLS = ("tool_calls", "function_call")  # what an assistant's turn has besides or instead of its content
_TOOL_PARTS = ("tool_use", "tool_call", "tool_result", "tool_response", "function_call", "function_call_output")
_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream goes on: indices of the file, the record in it, the user turn in its conversation."""

    file: int = 0
    record: int = 0
    turn: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> StreamPosition:
        """Raise `UserError` unless `value` is what `to_json` gives."""
        names = list(asdict(cls()))
        numbers = value if isinstance(value, dict) and sorted(value) == sorted(names) else None
        if numbers is None or not all(type(n) is int and n >= 0 for n in numbers.values()):
            raise UserError(f"a stream position is an object of the numbers {', '.join(names)}, not {value!r:.80}")
        return cls(**numbers)


@dataclass(frozen=True)
class Conversation:
    """Messages with the source's id, or else a hash of them; the stream goes on at `position`, after it."""

    id: str
    messages: tuple[Message, ...]
    position: StreamPosition


@dataclass(frozen=True)
class StreamLimits:
    """What one stream may cost: longer messages and records are skipped, older ids are forgotten.

    Parsing a record takes up to 30 times its bytes in memory, a remembered id about 150 bytes.
    """

    max_message_chars: int = 1_000_000
    max_messages: int = 10_000
    max_record_bytes: int = 16 << 20
    remembered_ids: int = 200_000


class ConversationStream:
    """Iterate conversations from JSON arrays, JSON lines or text lines; plain, gzip or zstd; "-" is stdin.

    Damaged records are skipped and counted. `read` is the number of usable conversations, `counts` says how
    many were skipped for which reason, `ends_early` whether some file stops in the middle. Iterating again
    starts afresh. Raises `UserError` for a path that cannot be read and, at the end, for a stream without any
    usable conversation.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        start: StreamPosition | None = None,
        limits: StreamLimits | None = None,
    ):
        self.paths = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self.start = start or StreamPosition()
        self.limits = limits or StreamLimits()
        self._check_paths()
        self._pipes = {path for path in self.paths if path == STDIN or not Path(path).is_file()}
        self._reset()

    def __iter__(self) -> Iterator[Conversation]:
        self._reset()
        for path in self.paths:
            if path not in self._pipes:  # before the first conversation, not hours later
                RecordReader(ByteSource(path), self.limits.max_record_bytes).check()
        for index, path in enumerate(self.paths):
            yield from self._read_file(index, path)
        is_resumed_pipe = bool(self._pipes) and self.start != StreamPosition()
        if not self.read and not is_resumed_pipe:
            raise UserError(f"no usable conversation in {', '.join(self.paths)}: {self.summary()}")

    def summary(self) -> str:
        """One line for people: how many were read, how many skipped and why, whether a file ends early."""
        short = {reason: n for reason, n in self.counts.items() if reason.startswith(CUT_SHORT)}
        parts = [f"{self.read:,} conversations read"]
        for counts, what in ((self.counts - collections.Counter(short), "skipped"), (short, "of them cut short")):
            reasons = ", ".join(f"{reason.removeprefix(CUT_SHORT)}: {n}" for reason, n in sorted(counts.items()))
            parts += [f"{sum(counts.values()):,} {what} ({reasons})"] if reasons else []
        return ", ".join(parts) + ("; the data end early" if self.ends_early else "")

    @property
    def is_repeatable(self) -> bool:
        """Whether the same conversations can be read again (stdin and other pipes cannot)."""
        return not self._pipes

    def _reset(self) -> None:
        self.read = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.ends_early = False
        # Hashes in the order they came, with the index of their first file: of file and id, and of messages.
        self._seen: dict[bytes, int] = {}
        self._contents: dict[bytes, int] = {}

    def _check_paths(self) -> None:
        if not self.paths or self.paths.count(STDIN) > 1:
            raise UserError(f"a conversation stream needs one path or more, and stdin at most once: {self.paths}")
        if self.start.file > len(self.paths):
            raise UserError(f"the stream position is in file {self.start.file}, but only {len(self.paths)} are given")
        for path in self.paths:
            _check_readable(path)

    def _read_file(self, index: int, path: str) -> Iterator[Conversation]:
        source = ByteSource(path)
        reader = RecordReader(source, self.limits.max_record_bytes)
        first = self.start.record if path in self._pipes and index == self.start.file else 0
        for number, record in enumerate(reader, first):
            conversation = self._accept(record, StreamPosition(index, number + 1))
            if conversation and (index, number) >= (self.start.file, self.start.record):
                yield conversation
        self.ends_early = self.ends_early or reader.ends_early or source.damage is not None
        if source.damage and not (source.damage == CUT_OFF and reader.ends_early):  # counted as a record
            self.counts[source.damage] += 1

    def _accept(self, record: object, position: StreamPosition) -> Conversation | None:
        """The conversation in `record`, or None after counting why there is none."""
        try:
            fields = _object(record)
            messages, cut = parse_messages(fields, self.limits)
            text = json.dumps([(message.role, message.content) for message in messages])
            name = _conversation_id(fields) or _digest(text).hex()
            self._remember(name, text, position.file)
        except _UnusableError as unusable:
            self.counts[unusable.reason] += 1
            return None
        self.read += 1
        if cut is not None:
            self.counts[CUT_SHORT + cut] += 1
        return Conversation(name, messages, position)

    def _remember(self, name: str, text: str, file: int) -> None:
        """Refuse what was read before: the same id in one file, or the same messages in an earlier one.

        An id is a name inside its file only, since many files number from 0.
        """
        named, content = _digest(f"{file} {name}"), _digest(text)
        if named in self._seen or self._contents.get(content, file) < file:
            raise _UnusableError(DUPLICATE)
        for seen, key in ((self._seen, named), (self._contents, content)):
            seen.setdefault(key, file)
            if len(seen) > self.limits.remembered_ids:
                del seen[next(iter(seen))]


class _UnusableError(Exception):
    """A record is skipped for `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _EndError(Exception):
    """A conversation ends before this turn, for `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _object(record: object) -> dict[str, Any]:
    if isinstance(record, Damaged):
        raise _UnusableError(record.reason)
    if not isinstance(record, dict):
        raise _UnusableError(NOT_AN_OBJECT)
    return record


def parse_messages(record: dict[str, Any], limits: StreamLimits) -> tuple[tuple[Message, ...], str | None]:
    """The messages of one record (`messages` or `conversations`), and why it was cut short, if it was.

    A conversation ends before a turn with a tool, an empty turn, one that is no text or one of nobody known. An empty
    system message is none. Raises `_UnusableError` with the reason where no question is left.
    """
    turns = _field(record, "messages", "conversations")
    if not isinstance(turns, list):
        raise _UnusableError(WRONG_TYPE)
    if len(turns) > limits.max_messages:
        raise _UnusableError(TOO_LONG)
    if not turns:
        raise _UnusableError(EMPTY)
    messages, cut, is_last = _until_unusable(turns, limits.max_message_chars)
    if all(message.role != "user" for message in messages):
        raise _UnusableError(cut or NO_USER_MESSAGE)
    system = next((text for name in _SYSTEM_FIELDS if (text := _system(record.get(name))).strip()), "")
    if system and all(message.role != "system" for message in messages):
        _check_content(system, limits.max_message_chars)
        messages.insert(0, Message("system", system))
    return tuple(messages), None if cut == EMPTY and is_last else cut


def _until_unusable(turns: list[object], max_chars: int) -> tuple[list[Message], str | None, bool]:
    """The messages before the first turn that cannot be one, what that turn is, and whether it is the last."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        try:
            message = _message(turn)
        except _EndError as end:
            return messages, end.reason, number == len(turns)
        if message is not None:
            _check_content(message.content, max_chars)
            messages.append(message)
    return messages, None, True


def _message(turn: object) -> Message | None:
    """The message of one turn, None for an empty system message; `_EndError` where a conversation ends before it.

    A turn without a role, or that is no turn at all, is damage: it spoils the whole conversation.
    """
    if turn is None:
        raise _UnusableError(MISSING_FIELD)
    if not isinstance(turn, dict):
        raise _UnusableError(WRONG_TYPE)
    role = _field(turn, "role", "from")
    if not isinstance(role, str):
        raise _UnusableError(WRONG_ROLE)
    name = role.strip().lower()
    calls = next((key for key in _CALLS if turn.get(key)), None)
    if name in TOOL_ROLES or calls is not None:
        raise _EndError(f"turn of {calls or name}")
    if name not in ROLES:
        raise _EndError(WRONG_ROLE)
    content = _text(next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None))
    if content is not None and content.strip():
        return Message(ROLES[name], content)
    if ROLES[name] != "system":
        raise _EndError(MISSING_FIELD if content is None else EMPTY)
    return None


def _text(content: object) -> str | None:
    """A turn's text, which may come in parts; None if there is none, `_EndError` if it is something else."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    tool = next((kind for kind in _TOOL_PARTS if kind in kinds), None)
    if tool is not None:
        raise _EndError(f"turn of {tool}")
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise _EndError(WRONG_TYPE)
    return "".join(strings)


def _system(value: object) -> str:
    """The text of a record's own field for it; empty where it is something else."""
    try:
        return _text(value) or ""
    except _EndError:
        return ""


def _check_content(content: str, max_chars: int) -> None:
    if len(content) > max_chars:
        raise _UnusableError(TOO_LONG)
    _check_encodable(content)


def _field(value: dict[str, Any], *names: str) -> object:
    """The first of `names` that is there and not null."""
    for name in names:
        if value.get(name) is not None:
            return value[name]
    raise _UnusableError(MISSING_FIELD)


def _conversation_id(record: dict[str, Any]) -> str | None:
    """The record's own name, if it has a sensible one."""
    name = record.get("id", record.get("conversation_id"))
    if isinstance(name, str) and 0 < len(name) <= 256:
        _check_encodable(name)
        return name
    return str(name) if type(name) is int else None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _check_encodable(text: str) -> None:
    """Refuse lone surrogates: bad bytes in the file, or half of a pair of \\u escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnusableError(INVALID_UTF8) from None


def _check_readable(path: str) -> None:
    # Asked, not tried: opening and closing a named pipe would end its writer.
    if path == STDIN:
        return
    for fault, is_so in (
        ("there is no such file", not os.path.exists(path)),
        ("it is a directory", os.path.isdir(path)),
        ("permission denied", not os.access(path, os.R_OK)),
    ):
        if is_so:
            raise UserError(f"cannot read conversations from {path}: {fault}; give a file, or - for stdin")
