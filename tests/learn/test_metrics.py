"""metrics.jsonl under faults: a disk that refuses, lines that are no records."""

from __future__ import annotations

import json
import os
import resource

import pytest

from dvi_jax.errors import UserError
from dvi_jax.learn.metrics import MetricsLog


def lines(log):
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def record(step, kind="train"):
    return {"kind": kind, "step": step}


def test_what_the_disk_refuses_is_written_later(tmp_path):
    """The operating system takes a part of a line, then nothing: whole lines stay, and no record is lost."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    try:
        log.append(record(2))
        assert lines(log) == [record(1)]
        log.append(record(3))
        assert lines(log) == [record(1)]
        with pytest.raises(OSError, match="No space left on device"):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.flush()  # though nothing was appended since there is room again: a snapshot that comes now need not fail
    assert lines(log) == [record(1), record(2), record(3)]
    log.append(record(4))
    log.flush()
    assert lines(log) == [record(1), record(2), record(3), record(4)]


def test_rewind_keeps_every_record_up_to_a_step(tmp_path):
    """A damaged line in the middle costs that line alone."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        log.append(record(step))
        log.append(record(step, "eval"))
    log.append(record(6, "summary"))
    text = log.path.read_bytes().replace(b'{"kind": "train", "step": 4}', b'{"kind": \xff"train", "step": 4}')
    log.path.write_bytes(text + b'{"kind": "train", "st')
    assert log.rewind(4) == [record(2, "eval"), record(4, "eval")]
    log.append(record(5))
    assert lines(log) == [record(2), record(2, "eval"), record(4, "eval"), record(5)]


def test_numbers_that_json_lacks_are_null(tmp_path):
    """Also those that an earlier release wrote in its own way, once a run is resumed."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(1) | {"loss": float("nan"), "agreement": [0.5, float("inf")], "more": {"x": -float("inf")}})
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 2, "loss": NaN}\n')
    log.rewind(2)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = [json.loads(line, parse_constant=refuse) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert read == [
        record(1) | {"loss": None, "agreement": [0.5, None], "more": {"x": None}},
        record(2) | {"loss": None},
    ]


def test_lines_and_files_that_are_none(tmp_path):
    """Deep nesting costs its line; a pipe is refused before anything waits for it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + '\n{"kind": "train", "step": 1}\n', encoding="utf-8")
    assert MetricsLog(path).records("train") == [record(1)]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a file"):
        MetricsLog(path)
