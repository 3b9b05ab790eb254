"""`python -m experiments.mutants`: faults put into the core on purpose, each with the test that must notice it.

    python -m experiments.mutants [--only TEXT] [--part I/N] [--jobs N] [--out FILE.json]

`mutants.toml` lists them. Each is made in a copy of the repository, where its test then has to fail; a test that does
not pass without the fault proves nothing, so all of them run there once before. Exit status 1 if a fault survives.
With --part the list is tried in pieces: FILE.json keeps what is known of the faults that were not tried this time, each
with the day it was tried.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import inspect
import json
import os
import pkgutil
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from dvi_jax.errors import ArgumentParser, UserError, add_debug, at_least_one, run_cli
from experiments.measure import environment, write_result

ROOT = Path(__file__).parents[1]
PARTS = ("dvi_jax", "conversion", "kangaroo_ref", "experiments", "tests", "pyproject.toml")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "results")
SECONDS = 300.0  # of one test, compiling included
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"
OUTCOMES = {0: SURVIVED, 1: KILLED}  # by pytest's exit status; any other: the test could not run


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` in `file`, where it is exactly once, becomes `new`; `test` must then fail.

    `quick`: the test takes no fixture but tmp_path, and compiles next to nothing.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    quick: bool = False

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the fault."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise UserError(f"mutant {self.name!r}: {self.file} has its text {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


def load_mutants() -> list[Mutant]:
    """Those of mutants.toml, in its order."""
    with (ROOT / "experiments" / "mutants.toml").open("rb") as file:
        return [Mutant(**entry) for entry in tomllib.load(file)["mutant"]]


# In a copy of the repository.


def main(arguments: list[str] | None = None) -> int:
    """Try all mutants, print the table."""
    options = _parser().parse_args(arguments)
    part, parts = options.part
    mutants = [mutant for mutant in load_mutants() if options.only in mutant.name + mutant.file + mutant.test]
    mutants = mutants[len(mutants) * (part - 1) // parts : len(mutants) * part // parts]
    with tempfile.TemporaryDirectory() as scratch:
        programs = Path(scratch) / "programs"
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            copies.put(_copy(Path(scratch) / str(number)))
        sound = _run_tests(copies.queue[0], sorted({mutant.test for mutant in mutants}), programs, len(mutants))
        if sound != SURVIVED:
            raise UserError("a test fails without any fault: see the lines above")
        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(lambda mutant: _try(mutant, copies, programs), mutants))
    today = datetime.date.today().isoformat()
    rows = [
        describe(mutant) | {"outcome": outcome, "tried": today}
        for mutant, outcome in zip(mutants, outcomes, strict=True)
    ]
    show(rows, Console())
    if options.out:
        known = with_earlier(rows, Path(options.out))
        write_result(Path(options.out), {"environment": environment(), "mutants": known})
    return int(any(row["outcome"] != KILLED for row in rows))


def describe(mutant: Mutant) -> dict[str, str]:
    """What tells a fault from others in a table."""
    return {"mutant": mutant.name, "file": mutant.file, "test": mutant.test}


def with_earlier(rows: Sequence[dict[str, str]], path: Path) -> list[dict[str, str]]:
    """`rows`, and those that an earlier result has of other faults which are still listed, in the list's order."""
    found = json.loads(path.read_text(encoding="utf-8"))["mutants"] if path.exists() else []
    keys = [tuple(describe(mutant).values()) for mutant in load_mutants()]
    outcomes = {(row["mutant"], row["file"], row["test"]): row for row in [*found, *rows]}
    return [outcomes[key] for key in keys if key in outcomes]


def part_of(text: str) -> tuple[int, int]:
    """I and N of I/N."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text, re.ASCII)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N, the I-th of N pieces, got {text!r}")
    return int(found[1]), int(found[2])


def show(rows: Sequence[dict[str, str]], console: Console) -> None:
    """Every mutant and what came of it."""
    killed = sum(row["outcome"] == KILLED for row in rows)
    table = Table("fault", "test that must notice it", "", title=f"{killed} of {len(rows)} faults noticed")
    for row in rows:
        table.add_row(row["mutant"], row["test"].removeprefix("tests/"), row["outcome"])
    console.print(table)


def _copy(root: Path) -> Path:
    root.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, root / part, ignore=NOT_COPIED)
        else:
            shutil.copy(ROOT / part, root / part)
    return root


def _try(mutant: Mutant, copies: queue.Queue[Path], programs: Path) -> str:
    """The outcome of one mutant, in a copy that is put back as it was."""
    root = copies.get()
    path, text = root / mutant.file, mutant.applied(root)
    whole = path.read_text(encoding="utf-8")
    try:
        path.write_text(text, encoding="utf-8")
        outcome = _run_tests(root, [mutant.test], programs)
    finally:
        path.write_text(whole, encoding="utf-8")
        copies.put(root)
    print(f"{outcome:9} {mutant.name}", flush=True)
    return outcome


def _run_tests(root: Path, tests: list[str], programs: Path, count: int = 1) -> str:
    """What pytest makes of tests in a copy; their programs are kept for the next, as are those of `make test`."""
    plugins = ["-p", "no:xdist", "-p", "no:cacheprovider", "-p", "experiments.no_shrinking"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", *plugins]
    # Bytecode of an edited file would pass for new: it is told by size and second.
    variables = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            [*command, "--programs", str(programs), *tests],
            cwd=root,
            env=variables,
            timeout=SECONDS * count,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return BROKEN
    outcome = OUTCOMES.get(ended.returncode, BROKEN)
    if outcome == BROKEN or (len(tests) > 1 and outcome == KILLED):
        print(ended.stdout[-3000:], ended.stderr[-1000:], file=sys.stderr)
    return outcome


# In this process, for quick ones.


def is_noticed(mutant: Mutant, scratch: Path) -> bool:
    """Whether the test of a quick mutant fails with its fault; `AssertionError` if it fails without."""
    path, _, name = mutant.test.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    test = getattr(module, name)
    _call(test, scratch / "without")
    with faulty(mutant):
        try:
            _call(test, scratch / "with")
        except (Exception, pytest.fail.Exception):  # a test may fail in any way
            return True
    return False


@contextmanager
def faulty(mutant: Mutant) -> Iterator[None]:
    """The one function that the fault is in, with the fault; whoever holds it, has it so."""
    module = pkgutil.resolve_name(mutant.file.removesuffix(".py").replace("/", "."))
    whole, text = (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.applied()
    names = _enclosing(whole, whole[: whole.index(mutant.old)].count("\n") + 1)
    function: Any = module
    for name in names:
        function = inspect.getattr_static(function, name)
    function = getattr(function, "__func__", function)
    assert isinstance(function, FunctionType)
    code = compile(text, mutant.file, "exec", dont_inherit=True)
    for name in names:
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    sound = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = sound


def _enclosing(text: str, line: int) -> list[str]:
    """The names of the class, if any, and of the function that a line is in."""
    names: list[str] = []
    body = ast.parse(text).body
    while True:
        kinds = (ast.ClassDef, ast.FunctionDef)
        (found,) = (node for node in body if isinstance(node, kinds) and node.lineno <= line <= (node.end_lineno or 0))
        names.append(found.name)
        if isinstance(found, ast.FunctionDef):
            return names
        body = found.body


def _call(test: Callable[..., None], scratch: Path) -> None:
    """A test with each set of its parameters, and a directory of its own if it asks for one."""
    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            cases = [dict(zip(names, value, strict=True)) for value in values]
    for number, case in enumerate(cases):
        if "tmp_path" in inspect.signature(test).parameters:
            case["tmp_path"] = scratch / str(number)
            case["tmp_path"].mkdir(parents=True)
        test(**case)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.mutants", description="Put faults in; the tests must notice.")
    parser.add_argument("--only", default="", metavar="TEXT", help="only mutants with this in name, file or test")
    parser.add_argument("--part", type=part_of, default="1/1", metavar="I/N", help="only the I-th of N pieces of these")
    parser.add_argument("--jobs", type=at_least_one, default=2, metavar="N", help="mutants tried at once")
    parser.add_argument("--out", metavar="FILE.json", help="write what the table says, too")
    add_debug(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
