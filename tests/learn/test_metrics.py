"""metrics.jsonl under faults: a disk that refuses, lines that are no records."""

from __future__ import annotations

import json
import resource

import pytest

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
