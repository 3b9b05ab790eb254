"""How often a GPU's recorded programs are recorded anew in another experiment, and what that takes the host.

    python -m experiments.graph_updates engine_load --shape smollm2 --plan plain --slots 16 --requests 400 --out F

XLA gives a GPU a program as graphs of commands, with the addresses of their arrays. If any has moved since, all its
commands are recorded again, by the thread that decodes. Counted are graphs by their number of commands, in the second
half of all runs, in which programs have been compiled and arrays have found their places. What is printed meanwhile is
the experiment's own. On a CPU there are no graphs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dvi_jax.errors import UserError, run_cli

# What XLA's runtime then tells of each run of a graph (its file `command_buffer_thunk.cc`).
TELL = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_buffer_thunk=3"}
_TOLD = "command_buffer_thunk.cc"
_RUN = "Execute command buffer"
_UPDATED = re.compile(r"Updated command buffer in (\d+) .s; num_commands=(\d+)")


class Event(NamedTuple):
    """A graph was run, or before that recorded anew."""

    commands: int  # of an update, 0 for a run
    microseconds: int


class Graphs(NamedTuple):
    """In the second half of all runs."""

    runs: int
    updates: dict[int, list[int]]  # by the number of commands: microseconds of each


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment, and count."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or not re.fullmatch(r"[a-z_]+", given[0]):
        raise UserError("name an experiment, such as engine_load or serve_learning, and then its own options")
    name, *options = given
    command = [sys.executable, "-m", f"experiments.{name}", *options]
    with subprocess.Popen(
        command, env=os.environ | TELL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as child:
        assert child.stderr is not None
        with ExitStack() as stack:
            stack.callback(child.terminate)  # unless all of it is read
            events = list(read(child.stderr))
            stack.pop_all()
    if child.returncode:
        raise UserError(f"experiments.{name} has failed ({child.returncode})")
    if not events:
        raise UserError("XLA told of no graph: there are none on a CPU, and another release may tell in other words")
    show(second_half(events))
    return 0


def read(lines: Iterable[str]) -> Iterable[Event]:
    """What XLA tells; every other line goes on to the standard error."""
    for line in lines:
        if _TOLD not in line:
            sys.stderr.write(line)
        elif _RUN in line:
            yield Event(0, 0)
        elif found := _UPDATED.search(line):
            yield Event(int(found[2]), int(found[1]))


def second_half(events: Sequence[Event]) -> Graphs:
    """Of the runs, and what was recorded anew between them."""
    total = sum(not event.commands for event in events)
    runs, updates = 0, defaultdict[int, list[int]](list)
    for event in events:
        if event.commands and 2 * runs >= total:
            updates[event.commands].append(event.microseconds)
        runs += not event.commands
    return Graphs(total // 2, dict(updates))


def show(graphs: Graphs) -> None:
    """A table, graphs that took most time first."""
    table = Table("commands", "recorded anew", "ms each", "ms in all", title=f"graphs run {graphs.runs} times")
    for commands, took in sorted(graphs.updates.items(), key=lambda item: -sum(item[1])):
        table.add_row(str(commands), str(len(took)), f"{sum(took) / len(took) / 1e3:.2f}", f"{sum(took) / 1e3:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
