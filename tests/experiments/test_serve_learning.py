"""The stream that an engine serves with and without learning, at the smallest scale: counts and ids, no rates."""

import json

import pytest

from experiments.serve_learning import main


@pytest.mark.full
def test_both_engines_give_the_same_replies(tmp_path):
    out = tmp_path / "curve.jsonl"
    small = [
        "--requests",
        "24",
        "--every",
        "8",
        "--clients",
        "3",
        "--slots",
        "2",
        "--window",
        "64",
        "--plan",
        "chain:1",
    ]
    assert main([*small, "--out", str(out), "--learn-share", "0.9"]) == 0
    about, *records, equal = [json.loads(line) for line in out.read_text().splitlines()]
    assert about["kind"] == "about"
    assert (equal["requests"], equal["different"]) == (24, 0)
    frozen, learning = ([r for r in records if r["engine"] == name] for name in ("frozen", "learning"))
    for lines in (frozen, learning):
        assert [line["kind"] for line in lines[-1:]] == ["end"]
        assert lines[-1]["requests"] == 24
        assert all(1 <= line["tokens_per_round"] <= 2 for line in lines)
        assert all(1 <= line["rounds_per_stretch"] <= 16 and 0 < line["slots_at_work"] <= 1 for line in lines)
        # The last line is of the whole; its seconds are parts of the engine's thread, which other threads interrupt.
        parts = [lines[-1][f"{part}_seconds"] for part in ("host", "waited", "handed", "learner")]
        assert all(seconds > 0 for seconds in parts[:3])
        assert sum(parts) < lines[-1]["seconds"]
        assert lines[-1]["stretches"] >= sum(line["stretches"] for line in lines[:-1]) > 0
    assert learning[-1]["updates"] >= 1
    assert learning[-1]["learned_positions"] <= 64 * 4 * learning[-1]["updates"]
    assert learning[-1]["learner_seconds"] > 0 == frozen[-1]["learner_seconds"]
    assert "updates" not in frozen[-1]
