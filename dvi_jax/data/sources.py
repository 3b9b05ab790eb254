"""Where the bytes come from: a file or stdin, plain, gzip or zstd.

Damage in the data never raises here: what could be read is yielded, and `ByteSource.damage` names the fault.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

STDIN = "-"
CUT_OFF = "cut off"
VANISHED = "file vanished"
READ_ERROR = "read error"
DAMAGED_COMPRESSION = "damaged compressed data"

CHUNK_BYTES = 1 << 20
# Compressed bytes a call. It bounds what one call can unpack (1 KiB of zstd can stand for 32 MiB) and what is lost
# with a call that meets damage.
STEP_BYTES = 1 << 10
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class ByteSource:
    """The decompressed bytes of one path ("-" is stdin), in chunks; read once."""

    def __init__(self, path: str):
        self.path = path
        self.damage: str | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield bytes until the end or the first damage, which is then named in `damage`."""
        try:
            with _open(self.path) as file:
                yield from self._decompressed(file)
        except FileNotFoundError:
            self.damage = VANISHED
        except OSError:
            self.damage = READ_ERROR
        except (zlib.error, zstandard.ZstdError):
            self.damage = DAMAGED_COMPRESSION

    def _decompressed(self, file: BinaryIO) -> Iterator[bytes]:
        raw = _raw_chunks(file)
        head = b""
        while len(head) < len(ZSTD_MAGIC) and (chunk := next(raw, b"")):
            head += chunk
        raw = itertools.chain([head] if head else [], raw)
        if head.startswith(GZIP_MAGIC):
            whole = yield from _unpack(raw, lambda: zlib.decompressobj(wbits=31))
        elif head.startswith(ZSTD_MAGIC):
            whole = yield from _unpack(raw, lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            yield from raw
            whole = True
        if not whole:
            self.damage = CUT_OFF


def _open(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    return contextlib.nullcontext(sys.stdin.buffer) if path == STDIN else Path(path).open("rb")


def _raw_chunks(file: BinaryIO) -> Iterator[bytes]:
    # read1 hands over what a pipe has delivered instead of waiting for a full chunk.
    while chunk := file.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # typing.BinaryIO lacks what all buffers have
        yield chunk


class _Inflater(Protocol):
    """What zlib's and zstandard's decompression objects have in common; one for each frame."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _unpack(raw: Iterable[bytes], new_inflater: Callable[[], _Inflater]) -> Generator[bytes, None, bool]:
    """Yield the contents of all frames; return whether the last one was whole."""
    frames = _Frames(new_inflater)
    for data in raw:
        yield from _batched(frames.unpack(data))
    return frames.inflater is None


class _Frames:
    """Gzip members or zstd frames, one after the other; `inflater` is None between them."""

    def __init__(self, new_inflater: Callable[[], _Inflater]):
        self.inflater: _Inflater | None = None
        self._new_inflater = new_inflater

    def unpack(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), STEP_BYTES):
            step = data[start : start + STEP_BYTES]
            while step := step if self.inflater else step.lstrip(b"\0"):  # zeros between frames are padding
                self.inflater = self.inflater or self._new_inflater()
                yield self.inflater.decompress(step)
                step = self.inflater.unused_data
                self.inflater = None if self.inflater.eof else self.inflater


def _batched(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces joined and large ones split to chunks, none empty, without waiting for more than has arrived."""
    pending = bytearray()
    try:
        for piece in pieces:
            pending += piece
            while len(pending) >= CHUNK_BYTES:
                yield bytes(pending[:CHUNK_BYTES])
                del pending[:CHUNK_BYTES]
    except (zlib.error, zstandard.ZstdError):
        if pending:
            yield bytes(pending)  # what came before the damage is whole
        raise
    if pending:
        yield bytes(pending)
