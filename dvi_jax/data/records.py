"""From bytes to records: a JSON array, JSON lines or plain text lines, recognised by their content.

A damaged record becomes `Damaged(reason)` and reading goes on at the next record. The JSON array is parsed
one element at a time with the standard library's decoder, because an event parser stops for good at the first
bad byte.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dvi_jax.data.encodings import HEAD_BYTES, refuse_binary, unix_lines, utf8_chunks
from dvi_jax.data.sources import CUT_OFF, ByteSource

INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "invalid UTF-8"
TOO_LONG = "too long"
NOT_AN_OBJECT = "not an object"

ARRAY, JSON_LINES, TEXT_LINES = "array", "json lines", "text lines"

_BOM = codecs.BOM_UTF8
_LINE_END = re.compile(rb"[\r\n]")
_ARRAY_START = re.compile(rb"\s*\[\s*(?:[{\]]|$)|\s*\{\s*$", re.MULTILINE)
_SEPARATORS = re.compile(r"[ \t\n\r\f\v,\[\]]*")
_NOT_A_BRACKET = {ord(blank): None for blank in ", \t\n\r\f\v"}
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.){1,64})"')
# Inside a JSON string a quote is escaped, so an unescaped `{"id":` is structure, never somebody's text.
_RECORD_KEYS = ("id", "messages", "conversations")
_LONGEST_START = 256
_LONGEST_LITERAL = 16
# Looking for records inside one that has no end parses the same text again. A hostile file may cause that for so many
# times the characters read, and some more in short files.
_PARSED_AGAIN, _PARSED_AGAIN_ANYWAY = 4, 1 << 20
# Nesting too deep for the decoder, or a number too long for it, takes at least so many characters.
_SHORTEST_FAULT = 500


@dataclass(frozen=True)
class Damaged:
    """Stands for a record that cannot be used, and says why."""

    reason: str


class RecordReader:
    """Records of one byte stream: parsed values and `Damaged`; `ends_early` is known after the last one."""

    def __init__(self, source: ByteSource, max_record_bytes: int):
        self.ends_early = False
        self._source = source
        self._max_record = max_record_bytes

    def __iter__(self) -> Iterator[object]:
        kind, chunks = self._open()
        if kind == ARRAY:
            return self._array(_TextBuffer(chunks))
        lines = unix_lines(chunks)
        return self._json_lines(lines) if kind == JSON_LINES else self._text_lines(lines)

    def check(self) -> None:
        """Raise `UserError` if the stream is not text, after reading its beginning; it is then used up."""
        self._open()

    def _open(self) -> tuple[str, Iterator[bytes]]:
        """The format, and all chunks in UTF-8."""
        chunks = utf8_chunks(self._source.chunks())
        head = b""
        while len(head) < HEAD_BYTES and not _LINE_END.search(head.lstrip()) and (chunk := next(chunks, b"")):
            head += chunk
        kind = detect_format(head, self._source.path)
        refuse_binary(head, self._source.path, is_text=kind == TEXT_LINES)
        return kind, itertools.chain([head], chunks)

    def _json_lines(self, chunks: Iterator[bytes]) -> Iterator[object]:
        for line, is_whole in _lines(chunks, self._max_record):
            record = line if isinstance(line, Damaged) else parse_json(line)
            if isinstance(record, Damaged) and not is_whole and record.reason != TOO_LONG:
                self.ends_early = True
                record = Damaged(CUT_OFF)
            yield record

    def _text_lines(self, chunks: Iterator[bytes]) -> Iterator[object]:
        for line, is_whole in _lines(chunks, self._max_record):
            text = line if isinstance(line, Damaged) else _decode(line)
            # A last line without a newline is usual, but not where the file is known to be cut.
            if not is_whole and self._source.damage:
                self.ends_early, text = True, Damaged(CUT_OFF)
            yield text if isinstance(text, Damaged) else {"messages": [{"role": "user", "content": text}]}

    def _array(self, buffer: _TextBuffer) -> Iterator[object]:
        is_open = False
        while True:
            bracket = buffer.skip_separators()
            is_open = bracket == "[" if bracket else is_open
            if buffer.at_end():
                self.ends_early = self.ends_early or is_open
                return
            record = buffer.next_value(self._max_record)
            self.ends_early = self.ends_early or record == Damaged(CUT_OFF)
            yield record


def detect_format(head: bytes, name: str) -> str:
    """ARRAY, JSON_LINES or TEXT_LINES, from the first bytes; the name decides only where they do not."""
    head = head.removeprefix(_BOM)
    if _ARRAY_START.match(head):
        return ARRAY
    lines = [line.strip() for line in head.splitlines()[:8]]
    if any(line.startswith(b"{") and isinstance(parse_json(line), dict) for line in lines):
        return JSON_LINES
    if re.search(r"\.(jsonl|ndjson)\b", name) or re.match(rb'\s*\{\s*"', head):
        return JSON_LINES
    return ARRAY if re.search(r"\.json\b", name) else TEXT_LINES


def parse_json(line: bytes) -> object:
    """The value of one JSON text, or `Damaged`."""
    text = _decode(line)
    if isinstance(text, Damaged):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number of more than 4300 digits
        return Damaged(INVALID_JSON)


def _decode(line: bytes) -> str | Damaged:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return Damaged(INVALID_UTF8)


def _lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[tuple[bytes | Damaged, bool]]:
    """Yield (line, has a newline) for every line that is not blank; drop overlong lines as they come."""
    pending, is_dropping = bytearray(), False
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for piece in whole:
            line = bytes(pending + piece) if pending else piece
            pending.clear()
            if is_dropping or len(line) > max_bytes:
                yield Damaged(TOO_LONG), True
                is_dropping = False
            elif line.strip():
                yield line, True
        pending += last
        if len(pending) > max_bytes:
            pending.clear()
            is_dropping = True
    if is_dropping:
        yield Damaged(TOO_LONG), False
    elif pending.strip():
        yield bytes(pending), False


class _TextBuffer:
    """A window on the decoded text: parses one JSON value at a time, finds the next record after damage."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        # A bad byte becomes a lone surrogate, which the conversation it falls into is then refused for.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder(strict=False)
        self._text, self._at, self._is_last = "", 0, False
        self._characters_read = self._parsed_in_vain = 0

    def skip_separators(self) -> str:
        """Move past blanks, commas and array brackets; return the last bracket or an empty string."""
        bracket = ""
        while True:
            skipped = _SEPARATORS.match(self._text, self._at)
            assert skipped is not None  # the pattern matches nothing at all as well
            brackets = skipped.group().translate(_NOT_A_BRACKET)
            bracket = brackets[-1:] or bracket
            self._at = skipped.end()
            if self._at < len(self._text) or not self._extend():
                return bracket

    def at_end(self) -> bool:
        return self._at >= len(self._text) and self._is_last

    def next_value(self, max_chars: int) -> object:
        """The object that starts here, or `Damaged`; moves past it."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_go_on(error):
                    return self._skip_record(INVALID_JSON, error.pos)
                if len(self._text) - self._at > max_chars:
                    return self._skip_endless(TOO_LONG)
                if not self._extend():
                    return self._cut_off()
            except (ValueError, RecursionError):  # ValueError: a number of more than 4300 digits
                return self._skip_record(INVALID_JSON, self._at + _SHORTEST_FAULT)
            else:
                if not isinstance(value, dict):  # behind a stray quote, a "string" may begin inside a record
                    return self._skip_record(NOT_AN_OBJECT, self._at)
                too_long = end - self._at > max_chars
                self._at = end
                return Damaged(TOO_LONG) if too_long else value

    def _extend(self) -> bool:
        """Read on until the unread text has doubled; False at the end of the stream."""
        if self._is_last:
            return False
        pieces, added = [self._text[self._at :]], 0
        while not self._is_last and added <= len(pieces[0]):
            chunk = next(self._chunks, None)
            self._is_last = chunk is None
            pieces.append(self._decoder.decode(chunk or b"", final=self._is_last))
            added += len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
        self._characters_read += added
        return added > 0

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the text was fine as far as it goes and only ends too soon."""
        return error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_LITERAL

    def _cut_off(self) -> Damaged:
        """Nothing follows, but a record without its end may have swallowed whole ones: look into it."""
        reason = CUT_OFF if self._text.startswith("{", self._at) else INVALID_JSON
        skipped = self._skip_endless(reason)
        return skipped if self._at >= len(self._text) else Damaged(INVALID_JSON)

    def _skip_endless(self, reason: str) -> Damaged:
        """Skip a record whose end was not found, but look for others inside it, unless that was done too often."""
        self._parsed_in_vain += len(self._text) - self._at
        allowed = _PARSED_AGAIN * self._characters_read + _PARSED_AGAIN_ANYWAY
        is_too_much = self._parsed_in_vain > allowed
        return self._skip_record(reason, len(self._text) if is_too_much else self._at + 1)

    def _skip_record(self, reason: str, search_from: int) -> Damaged:
        """Move to the next text that looks like the start of a record.

        Searching from where parsing failed, not from the failed record's start, keeps damaged input linear.
        """
        first_key = _FIRST_KEY.match(self._text, self._at)
        keys = {re.escape(key) for key in (*_RECORD_KEYS, *(first_key.groups() if first_key else ()))}
        start = re.compile(r'\{\s{0,64}"(?:' + "|".join(sorted(keys)) + r')"\s{0,64}:')
        self._at = max(self._at + self._text.startswith("{", self._at), search_from - _LONGEST_START)
        while not (found := start.search(self._text, self._at)):
            self._at = max(self._at, len(self._text) - _LONGEST_START)
            if not self._extend():
                self._at = len(self._text)
                return Damaged(reason)
        self._at = found.start()
        self._forget_the_past()
        return Damaged(reason)

    def _forget_the_past(self) -> None:
        # Every decoding error counts the line breaks before it: quadratic, if the text before is kept.
        if self._at > max(1 << 16, len(self._text) // 16):
            self._text, self._at = self._text[self._at :], 0
