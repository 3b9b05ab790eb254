"""Several processes that are one run: on one host or on many, with devices of its own each (`jax.distributed`).

All of them run the same program over one mesh and read the same files, so a model must lie at the same path on every
host. The first one talks and writes. A process that is lost ends the others: they hear of it in the next exchange, or
by its heartbeat.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from dvi_jax.errors import EXIT_STATUS, UserError, one_line

DETECTED = "auto"  # Slurm and Open MPI say how many there are and which one this is
HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is lost


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add --coordinator, --processes and --process-id."""
    group = parser.add_argument_group("several processes (the same command in each; the first one talks and writes)")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"where the first process listens; {DETECTED}: as Slurm or Open MPI say, with all else",
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


@contextlib.contextmanager
def one_of_several(options: argparse.Namespace) -> Iterator[None]:
    """What is run inside is one process of those that the options name; with none it is alone.

    Before the first use of jax. What goes wrong inside is one line, and ends this process without waiting for others.
    """
    if not _are_named(options):
        yield
        return
    where = {"coordinator_address": options.coordinator, "num_processes": options.processes}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is heard by who runs the program
    named = {} if options.coordinator == DETECTED else where | {"process_id": options.process_id}
    try:
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"no run of several processes at {options.coordinator}: {error}") from error
    errors = sys.stderr
    if jax.process_index():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process is
        os.dup2(sys.stdout.fileno(), 1)  # libraries say how they connect
    try:
        yield
    except UserError as error:
        _leave(f"process {jax.process_index()}: {error}", errors)
    except jax.errors.JaxRuntimeError as error:
        _leave(
            f"process {jax.process_index()} lost another one ({error}); begin again, a training run with --resume",
            errors,
        )
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def check_alike(*, measured: bool, instead: str) -> None:
    """Raise `UserError` that says what to do `instead` of what would be decided by measuring times, which differ."""
    if measured and jax.process_count() > 1:
        raise UserError(f"several processes must do alike: {instead}")


def _are_named(options: argparse.Namespace) -> bool:
    given = [options.coordinator, options.processes, options.process_id]
    if given == [None, None, None]:
        return False
    if options.coordinator == DETECTED and given[1:] == [None, None]:
        return True
    if None in given:
        raise UserError("--coordinator, --processes and --process-id go together")
    if not 0 <= options.process_id < options.processes:
        raise UserError(f"--process-id must be between 0 and {options.processes - 1}, got {options.process_id}")
    return True


def _leave(text: str, errors: object) -> NoReturn:
    """End at once: a shutdown would wait for the process that was lost."""
    print(f"error: {one_line(text)}", file=errors, flush=True)  # type: ignore[call-overload]
    os._exit(EXIT_STATUS)
