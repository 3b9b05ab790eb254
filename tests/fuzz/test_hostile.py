"""Some checkpoints and packed files made to take all memory or to block (`python -m experiments.fuzz.hostile`: all).

And some random settings and manifests (`python -m experiments.fuzz.ranges`).
"""

from __future__ import annotations

import random

import pytest

from dvi_jax.errors import UserError
from experiments.fuzz import ranges
from experiments.fuzz.hostile import cases
from experiments.fuzz.ranges import judged, try_manifest, try_settings
from experiments.tiny import write_tiny_run

CASES = {case.name: case for case in cases()}
SOME = (
    "packed: 256 TiB",
    "packed: 128 MiB of zeros",
    "packed: a huge mask",
    "packed: a long header",
    "packed: a pipe",
    "checkpoint: a base of 256 TiB",
    "checkpoint: a drafter of 2 GiB",
    "checkpoint: a drafter in pieces of 2 GiB",
    "checkpoint: an architecture of 16 TiB",
    "checkpoint: deep: drafter/_METADATA",
    "checkpoint: a pipe: base/embed/.zarray",
    "checkpoint: a pipe: draft_vocabulary.json",
)


def test_there_are_many():
    assert len(CASES) > 50


@pytest.mark.parametrize("name", SOME)
def test_it_is_refused_before_anything_is_read(tmp_path, name):
    CASES[name].make(tmp_path)
    with pytest.raises(UserError) as told:
        CASES[name].read(tmp_path)
    assert "\n" not in str(told.value)
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize("attempt", [try_settings, try_manifest])
def test_random_numbers_are_one_line_or_a_run(tmp_path, monkeypatch, attempt):
    """The run begins where nothing is spoiled."""
    config = write_tiny_run(tmp_path, questions=100)
    outcomes = [judged(attempt, config, random.Random(f"{attempt.__name__} {number}")) for number in range(12)]
    assert [outcome for outcome in outcomes if outcome[0] == "FAILED"] == []
    assert "refused" in {kind for kind, _ in outcomes}
    monkeypatch.setattr(ranges, "spoil", lambda document, rng: None)
    assert judged(attempt, config, random.Random(0)) == ("begun", "")
