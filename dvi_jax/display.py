"""Output that never ends what it shows: a full disk or a reader that left costs the lines, not the work."""

from __future__ import annotations

import io
import sys
from typing import TextIO

from rich.console import Console

from dvi_jax.errors import notice, write_nowhere


class UnfailingStream(io.TextIOBase):
    """`stream`, until it fails: that is told once on stderr, and whatever is written from then on is dropped."""

    def __init__(self, stream: TextIO):
        self._stream: TextIO | None = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(self._stream, error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(self._stream, error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _give_up(self, stream: TextIO, error: OSError) -> None:
        self._stream = None
        write_nowhere(stream)  # what it still holds would fail again when Python ends
        notice(f"the output cannot be written ({error.strerror}): the work goes on without it")


def unfailing_console() -> Console:
    """A console on stdout as an `UnfailingStream`."""
    return Console(file=UnfailingStream(sys.stdout))  # type: ignore[arg-type]  # all of IO[str] that rich uses
