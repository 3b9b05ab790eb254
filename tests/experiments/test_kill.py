"""The SIGKILL harness with one kill, and that it would notice a difference."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.kill import differences

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_killed_at_a_random_moment_and_resumed(tmp_path):
    """In a process of its own: it forks, which a process that has run jax must not."""
    out = tmp_path / "kill.json"
    command = [sys.executable, "-m", "experiments.kill", "--kills", "1", "--questions", "60", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["kills"] == len(report["kill_seconds"].split()) == sum(report["moments"].values()) == 1
    assert report["runs"] >= 1
    assert report["differences"] == []


def test_differences_are_seen():
    reference = {
        "checkpoint": {"drafter/norm": "a1", "base/norm": "b2"},
        "snapshot": {"name": "40", "key": "c3"},
        "metrics": [{"kind": "train", "step": 2}, {"kind": "summary", "step": 2}],
    }
    assert differences(reference, copy.deepcopy(reference)) == []
    other = copy.deepcopy(reference)
    other["checkpoint"]["drafter/norm"] = "a2"
    del other["snapshot"]["key"]
    other["metrics"] = [{"kind": "train", "step": 3}]
    assert differences(reference, other) == [
        "checkpoint: drafter/norm",
        "snapshot: key",
        "metrics: 1 records, not 2",
        "metrics: record 0",
    ]
