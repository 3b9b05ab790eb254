"""Errors meant for the person at the command line, and the wrapper that prints them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

EXIT_STATUS = 2
LONGEST_LINE = 1000
INTERRUPTED_STATUS = 130  # what shells report for Ctrl-C
TERMINATED_STATUS = 143  # for SIGTERM
NO_READER_STATUS = 141  # and for a program whose reader, `head` say, is gone
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user can put right: one line saying what is wrong and what would be right."""


class _Help(argparse.HelpFormatter):
    """Help that names every default there is, and in which commands and lists stand as they are written."""

    def _format_action(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        if isinstance(shown.default, list | tuple):
            shown.default = shlex.join(map(str, shown.default))
        is_none = shown.default is None or shown.default is False or shown.default in ("", argparse.SUPPRESS)
        if not is_none and (shown.option_strings or shown.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)):
            default = "default: %(default)s"
            shown.help = f"{shown.help} ({default})" if shown.help else default
        return super()._format_action(shown)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in text.strip().split("\n\n"):
            as_written = any(line.startswith((" ", "* ")) for line in paragraph.splitlines())
            filled.append(paragraph if as_written else super()._fill_text(paragraph, width, indent))
        return "\n\n".join(filled)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        named = {int: "N", at_least_one: "N", float: "X", Path: "PATH"}
        return named.get(action.type) or super()._get_default_metavar_for_optional(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are a `UserError` (one line) instead of a usage text and an exit."""

    def __init__(self, **options: Any):
        if sys.argv[0].startswith("dvi "):  # run by the command `dvi`, whose help names itself
            options["prog"] = sys.argv[0]
        super().__init__(**{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see --help)")


def at_least_one(text: str) -> int:
    """argparse's `type` for counts."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return number


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The option that `run_cli` looks for."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_cli(main: Callable[[], int | None]) -> int:
    """Run `main`; a `UserError` becomes one line on stderr and exit status 2.

    Anything else is a defect of ours and keeps its traceback. `--debug` on the command line shows the traceback
    of a `UserError` too. A reader of the output who leaves ends the program quietly, a disk that is full is one line,
    and letters that the terminal's encoding lacks are shown as question marks. SIGINT and SIGTERM end it with "stopped"
    and 130 or 143, unless `main` takes them itself.
    """
    _open_streams()
    with _sigterm_raises():
        return _run(main)


def _run(main: Callable[[], int | None]) -> int:
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except (OSError, UserError, KeyboardInterrupt, Terminated) as error:
        return status_of(error)


def status_of(error: BaseException) -> int:
    """The exit status of a program that `error` ends, said as `run_cli` says it; raises what keeps its traceback."""
    if isinstance(error, BrokenPipeError):
        write_nowhere(sys.stdout, sys.stderr)
        return NO_READER_STATUS
    if "--debug" in sys.argv:
        raise error
    if isinstance(error, OSError) and error.errno in _FULL:
        write_nowhere(sys.stdout)
        where = "the output" if error.filename is None else error.filename
        with contextlib.suppress(OSError):  # which may go to the same disk
            print(f"error: {one_line(f'cannot write {where}: {error.strerror}; make room for it')}", file=sys.stderr)
        return EXIT_STATUS
    if isinstance(error, UserError):
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_STATUS
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        print("stopped", file=sys.stderr)
        return TERMINATED_STATUS if isinstance(error, Terminated) else INTERRUPTED_STATUS
    raise error


class Terminated(BaseException):
    """SIGTERM was received; raised where the program is, as Python raises `KeyboardInterrupt`."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Unless somebody else takes the signal, or this is not the main thread, which alone can."""

    def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _open_streams() -> None:
    """Standard streams that every letter can be written to, also where a shell has closed one.

    Python leaves None for such a stream, and what is printed to None as stderr comes out on stdout.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process is
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write_nowhere(*streams: TextIO) -> None:
    """Let streams lead nowhere: what is still in their buffers would raise again when Python closes them."""
    with open(os.devnull, "wb") as nowhere:
        for stream in streams:
            with contextlib.suppress(io.UnsupportedOperation):  # it is no file
                os.dup2(nowhere.fileno(), stream.fileno())


def notice(text: str) -> None:
    """Tell the user, in one line on stderr if that can take it, what was done otherwise than asked or expected."""
    with contextlib.suppress(OSError):
        print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` on one line of at most `LONGEST_LINE` characters, without control characters.

    A message may repeat a name from a file, which must not reach the terminal as an escape sequence.
    """
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 3] + "..."
