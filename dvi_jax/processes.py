"""Several processes that are one run: on one host or on many, with devices of its own each (`jax.distributed`).

All of them run the same program over one mesh and read the same files, so a model must lie at the same path on every
host. The first one talks and writes, and tells the others what it alone has or measures (`told`). A process that is
lost ends the others: they hear of it in the next exchange, or by its heartbeat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
from jax._src import distributed  # jax has no public way to ask where the coordinator is
from jax.experimental import multihost_utils

from dvi_jax.errors import EXIT_STATUS, UserError, status_of

DETECTED = "auto"  # Slurm and Open MPI say how many there are and which one this is
HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is lost
END_SECONDS = 3600  # that the others may wait for one which has something left to do alone
PIECE = 2**30  # bytes of one broadcast: jax counts an array's elements in 32 bits
LENGTH_BYTES = 8
DEFECT_STATUS = 1  # of what keeps its traceback, as Python has it
FAILED_EXCHANGE = ("UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "DEADLINE_EXCEEDED: ", "ABORTED: ")  # how those begin


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
    Signals are the first one's affair: it ends as it does alone, and the others because it is gone.
    """
    if not _are_named(options):
        yield
        return
    where = {"coordinator_address": options.coordinator, "num_processes": options.processes}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is heard by who runs the program
    named = {} if options.coordinator == DETECTED else where | {"process_id": options.process_id}
    try:
        jax.distributed.initialize(
            **named, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=END_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"no run of several processes at {options.coordinator}: {error}") from error
    errors = sys.stderr
    if jax.process_index():
        # Whoever ends a job sends them to all of it. The first one answers, and the others end with it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process is
        os.dup2(sys.stdout.fileno(), 1)  # libraries say how they connect
    try:
        yield
    except BaseException as error:
        # The others may be waiting in an exchange, and a shutdown would wait for them.
        _leave(error, errors)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def check_alike(*, measured: bool, instead: str) -> None:
    """Raise `UserError` that says what to do `instead` of what would be decided by measuring times, which differ."""
    if measured and jax.process_count() > 1:
        raise UserError(f"several processes must do alike: {instead}")


def told(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, as JSON has it, in all of them, which call this together."""
    if jax.process_count() == 1:
        return make()
    return json.loads(told_bytes(json.dumps(make()).encode() if is_first() else b""))


def told_bytes(message: bytes) -> bytes:
    """The first process's message, in all of them, which call this together; the others' are not looked at."""
    size = int.from_bytes(_broadcast(len(message).to_bytes(LENGTH_BYTES, "little"), LENGTH_BYTES), "little")
    pieces = []
    for begin in range(0, size, PIECE):
        length = min(PIECE, size - begin)
        room = 1 << (length - 1).bit_length()  # few lengths, as each is a program
        pieces.append(_broadcast(message[begin : begin + length], room)[:length])
    return b"".join(pieces)


def _broadcast(piece: bytes, room: int) -> bytes:
    # As bytes: what is broadcast is a sum with zeros, in which minus zero would be lost.
    padded = np.zeros(room, np.uint8)
    padded[: len(piece)] = bytearray(piece)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def coordinator_host() -> str:
    """Where others have reached the first process, which calls this: by the name or address that jax was given."""
    address = distributed.global_state.coordinator_address or socket.gethostname() + ":"
    return address.rpartition(":")[0].strip("[]")


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


def _leave(error: BaseException, errors: TextIO) -> NoReturn:
    """End at once, with the status and the words of `errors.run_cli`, and with this process's number."""
    sys.stderr = errors
    number, status = f"process {jax.process_index()}", DEFECT_STATUS
    # jax raises either for an exchange that failed, by when it hears of it.
    is_lost = isinstance(error, jax.errors.JaxRuntimeError) or str(error).startswith(FAILED_EXCHANGE)
    if isinstance(error, UserError):
        error = UserError(f"{number}: {error}")
    elif is_lost and isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
        error = UserError(f"{number} lost another one ({error}); begin again, a training run with --resume")
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else EXIT_STATUS if error.code else 0
        else:
            status = status_of(error)
    except BaseException:  # a defect of ours
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=errors)
    for stream in (sys.stdout, errors):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
