"""Damaging valid files: a file is a list of tokens that a `Seed` packs into bytes; both levels are mutated.

Everything draws from one `random.Random`, so a case is a function of its seed.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_BYTES = 1 << 20  # a mutated file is cut here: repeats of repeats grow without end

_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|[\w.-]+|\s+|.', re.DOTALL)
_OPEN, _CLOSE = (b"{", b"["), (b"}", b"]")

# Values that JSON and YAML can write and that parsers stumble over.
TEXT_WORDS = (
    *(b"0", b"-1", b"1", b"1e999", b"-1e999", b"1e-999", b"0.5", b"NaN", b"-Infinity", b"null", b"true", b'""'),
    *(b"2147483648", b"9223372036854775808", b"18446744073709551616", b"9" * 400, b"-" + b"9" * 4300, b"9" * 4301),
    *(b'"\\ud800"', b'"\\u0000"', b'"../../etc/passwd"', b'"/etc/passwd"', b'".."', b'"' + b"x" * 5000 + b'"'),
    *(
        b"[]",
        b"{}",
        b"[[]]",
        b'{"": {}}',
        b"[" * 2000,
        b'{"a":' * 2000,
        b"]",
        b"}",
        b",",
        b":",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
)
_PLAIN_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    127,
    128,
    255,
    256,
    65535,
    1 << 20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)


@dataclass(frozen=True)
class Seed:
    """A valid file: `pack` of the joined tokens (or the tokens themselves, joined)."""

    tokens: tuple[bytes, ...]
    pack: Callable[[bytes], bytes] = bytes

    def whole(self) -> bytes:
        """The file undamaged."""
        return self.pack(b"".join(self.tokens))


def text_seed(text: str | bytes, pack: Callable[[bytes], bytes] = bytes) -> Seed:
    """A seed whose tokens are strings, numbers, words, blanks and single characters."""
    data = text.encode() if isinstance(text, str) else text
    return Seed(tuple(_TEXT.findall(data)), pack)


def mutate(rng: random.Random, seed: Seed, words: Sequence[bytes]) -> bytes:
    """`seed` with one to a few changes of its tokens, its packed bytes, or both; at most `MAX_BYTES` long."""
    level = rng.random()
    tokens = list(seed.tokens)
    if level < 0.8:
        # Half of the cases stay well formed: what a parser does with values is behind what it does with syntax.
        changes = TOKEN_MUTATIONS if level < 0.4 else GENTLE_MUTATIONS
        for _ in range(_few(rng)):
            tokens = rng.choice(changes)(rng, tokens, words)
    data = seed.pack(b"".join(tokens)[:MAX_BYTES])
    if level > 0.7:
        for _ in range(_few(rng)):
            data = rng.choice(BYTE_MUTATIONS)(rng, data)
    return data[:MAX_BYTES]


def _few(rng: random.Random) -> int:
    """1 in half of the cases, 2 in a quarter, and so on."""
    count = 1
    while rng.random() < 0.5 and count < 8:
        count += 1
    return count


def _span(rng: random.Random, length: int) -> slice:
    """A short range of positions, sometimes a long one."""
    start = rng.randrange(length + 1)
    return slice(start, start + rng.choice((1, 1, 2, 4, 16, length)))


def _closing(tokens: list[bytes], start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index] in _OPEN) - (tokens[index] in _CLOSE)
        if depth == 0:
            return index + 1
    return len(tokens)


def _value(rng: random.Random, tokens: list[bytes]) -> slice:
    """The range of one value: a single token, or all between two brackets."""
    start = rng.randrange(len(tokens)) if tokens else 0
    is_open = bool(tokens) and tokens[start] in _OPEN
    return slice(start, _closing(tokens, start) if is_open else start + 1)


def _replace(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    at = _value(rng, tokens)
    old = b"".join(tokens[at])
    is_number = b"\0" in old or not old.isascii()
    new = _number(rng, len(old)) if is_number else rng.choice(words)
    return [*tokens[: at.start], new, *tokens[at.stop :]]


def _drop(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    at = _value(rng, tokens) if rng.random() < 0.5 else _span(rng, len(tokens))
    return [*tokens[: at.start], *tokens[at.stop :]]


def _repeat(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    at = _value(rng, tokens) if rng.random() < 0.5 else _span(rng, len(tokens))
    times = rng.choice((1, 1, 1, 2, 30, 1000))
    piece = b"".join(tokens[at])[: MAX_BYTES // times]
    return [*tokens[: at.stop], piece * times, *tokens[at.stop :]]


def _move(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    """Put a copy of one value over another: an object where a number belongs, one key's value under another."""
    source, target = _value(rng, tokens), _value(rng, tokens)
    return [*tokens[: target.start], *tokens[source], *tokens[target.stop :]]


def _insert(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    at = rng.randrange(len(tokens) + 1)
    return [*tokens[:at], rng.choice(words), *tokens[at:]]


def _replace_value(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    """Put a word, or another value of the file, where a value stands; one field of a binary header for another."""
    values = [index for index, token in enumerate(tokens) if _before(tokens, index) == b":" and not token.isspace()]
    if not values:
        at = rng.randrange(len(tokens)) if tokens else 0
        return [*tokens[:at], _number(rng, len(tokens[at])) if tokens else b"", *tokens[at + 1 :]]
    at, other = rng.choice(values), rng.choice(values)
    stop = _closing(tokens, at) if tokens[at] in _OPEN else at + 1
    new = [rng.choice(words)] if rng.random() < 0.6 else tokens[other : _closing(tokens, other)]
    return [*tokens[:at], *new, *tokens[stop:]]


def _before(tokens: list[bytes], index: int) -> bytes:
    """The token before `index` that is no blank."""
    index -= 1
    while index >= 0 and tokens[index].isspace():
        index -= 1
    return tokens[index] if index >= 0 else b""


def _repeat_value(rng: random.Random, tokens: list[bytes], words: Sequence[bytes]) -> list[bytes]:
    """A list with an element twice."""
    opened = [index for index, token in enumerate(tokens) if token == b"[" and _closing(tokens, index) > index + 2]
    if not opened:
        return _move(rng, tokens, words)
    start = rng.choice(opened) + 1
    stop = _closing(tokens, start)
    return [*tokens[:stop], b",", *tokens[start:stop], *tokens[stop:]]


GENTLE_MUTATIONS = (_replace_value, _replace_value, _replace_value, _repeat_value)
TOKEN_MUTATIONS = (_replace, _replace, _replace, _move, _drop, _repeat, _insert)


def _number(rng: random.Random, size: int) -> bytes:
    value = rng.choice(_PLAIN_NUMBERS) if rng.random() < 0.8 else rng.getrandbits(64)
    return struct.pack("<Q", value)[:size].ljust(size, b"\xff")


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    new = _number(rng, rng.choice((1, 2, 4, 8)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + new + data[at + len(new) :]


def _insert_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[at:]


def _delete(rng: random.Random, data: bytes) -> bytes:
    at = _span(rng, len(data))
    return data[: at.start] + data[at.stop :]


def _duplicate(rng: random.Random, data: bytes) -> bytes:
    at = _span(rng, len(data))
    return data[: at.stop] + data[at] * rng.choice((1, 1, 3, 100)) + data[at.stop :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    """The head of the file, then what follows another place in it."""
    return data[: rng.randrange(len(data) + 1)] + data[rng.randrange(len(data) + 1) :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


BYTE_MUTATIONS = (_flip, _flip, _overwrite, _insert_bytes, _delete, _duplicate, _splice, _cut)
