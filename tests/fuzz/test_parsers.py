"""Some fuzz cases of every parser (`python -m experiments.fuzz` runs thousands), and the fuzzer's own honesty."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvi_jax.errors import UserError
from experiments.fuzz import worker
from experiments.fuzz.__main__ import fuzz
from experiments.fuzz.harness import ACCEPTED, FAILED, REFUSED, cases, reduce, run_case
from experiments.fuzz.mutate import text_seed
from experiments.fuzz.parsers import PARSERS, Parser

ROOT = Path(__file__).parents[2]
CASES = 60


@pytest.mark.parametrize("name", PARSERS)
def test_cases_are_accepted_or_refused_in_one_line(name):
    parser = PARSERS[name]()
    outcomes = [(number, worker.settled(parser, files)) for number, files in cases(parser, 0, 0, CASES)]
    assert [(number, outcome) for number, outcome in outcomes if outcome.kind == FAILED] == []
    assert {outcome.kind for _, outcome in outcomes} == {ACCEPTED, REFUSED}


@pytest.mark.parametrize("name", PARSERS)
def test_the_files_that_cases_are_made_from_are_valid(name):
    parser = PARSERS[name]()
    for seeds in parser.seeds:
        outcome = run_case(parser, {file: seed.whole() for file, seed in seeds.items()})
        assert outcome.kind == ACCEPTED, outcome


def read_number(folder: Path) -> None:
    """A parser with every fault that fuzzing should find, each behind a word."""
    text = (folder / "x").read_text(encoding="utf-8", errors="replace")
    if "boom" in text:
        raise KeyError(text)
    if "slow" in text:
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass
    if "refuse" in text:
        raise UserError("no")


FAULTY = Parser("faulty", ({"x": text_seed('{"a": 1, "b": [2, 3]}'), "y": text_seed("rest")},), read_number, (b"boom",))


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        ("fine", ACCEPTED, ""),
        ("refuse", REFUSED, ""),
        ("boom", FAILED, "KeyError at test_parsers.py:"),
        ("slow", FAILED, "slow"),
    ],
)
def test_a_case_is_judged(text, kind, detail):
    outcome = run_case(FAULTY, {"x": text.encode()})
    assert outcome.kind == kind
    assert outcome.detail.startswith(detail)


def test_a_fault_is_found_reduced_and_found_again():
    found = [(number, files) for number, files in cases(FAULTY, 0, 0, 100) if run_case(FAULTY, files).kind == FAILED]
    assert found
    number, files = found[0]
    assert list(cases(FAULTY, 0, number, 1)) == [(number, files)]
    assert list(cases(FAULTY, 1, number, 1)) != [(number, files)]
    smallest = reduce(files, lambda smaller: run_case(FAULTY, smaller).kind == FAILED)
    assert smallest == {"x": b"boom", "y": b""}


def test_cases_vary():
    everything = [json.dumps(sorted(map(repr, files.items()))) for _, files in cases(FAULTY, 0, 0, 200)]
    assert len(set(everything)) > 150


def test_a_worker_is_limited_and_sums_up():
    """The whole way once: a process of its own, its memory limit, its report."""
    result = fuzz("questions", 3, 10, 30)
    row = result.row()
    assert (row["cases"], row["failed"]) == (30, 0)
    assert row["accepted"] + row["refused"] == 30
    assert 0 < row["peak_mib"] < 1024


def test_a_worker_that_dies_is_a_failure_and_another_goes_on(tmp_path, monkeypatch):
    stand_in = tmp_path / "python"  # called as: python -m module NAME SEED FIRST COUNT
    stand_in.write_text(
        """#!/bin/sh
        if [ "$5" = 0 ]; then echo '{"case": 2}'; exit 9; fi
        echo '{"kinds": {"accepted": '$6'}, "slowest": 0.5, "peak": 1048576}'
        """
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    result = fuzz("questions", 0, 0, 10)
    assert result.failures == [{"failure": 2, "detail": "the process ended with status 9"}]
    assert result.kinds == {"failed": 1, "lost": 2, "accepted": 7}
    assert (result.slowest, result.peak) == (0.5, 1 << 20)


def test_memory_is_limited():
    code = "from experiments.fuzz import worker; worker.limit_memory(); bytearray(900 << 20); bytearray(1100 << 20)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr.strip().splitlines()[-1] == "MemoryError"
