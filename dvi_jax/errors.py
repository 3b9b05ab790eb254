"""Errors meant for the person at the command line, and the wrapper that prints them."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS = 2
LONGEST_LINE = 1000
INTERRUPTED_STATUS = 130  # what shells report for Ctrl-C
NO_READER_STATUS = 141  # and for a program whose reader, `head` say, is gone


class UserError(Exception):
    """Something the user can put right: one line saying what is wrong and what would be right."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are a `UserError` (one line) instead of a usage text and an exit."""

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
    of a `UserError` too. A reader of the output who leaves ends the program quietly, and letters that the terminal's
    encoding lacks are shown as question marks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = main() or 0
        if sys.stdout is not None:  # a shell may close it
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is still in the buffers would raise again when Python closes them.
        with open(os.devnull, "wb") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
        return NO_READER_STATUS
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print("stopped", file=sys.stderr)
        return INTERRUPTED_STATUS


def notice(text: str) -> None:
    """Tell the user, in one line on stderr, what was done otherwise than asked or expected."""
    print(f"note: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """`text` on one line of at most `LONGEST_LINE` characters, without control characters.

    A message may repeat a name from a file, which must not reach the terminal as an escape sequence.
    """
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 3] + "..."
