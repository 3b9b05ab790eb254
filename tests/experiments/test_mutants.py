"""The list of faults is true to the sources, and those whose tests are quick are noticed."""

from __future__ import annotations

import json

import pytest

from dvi_jax.learn.rollback import Watch
from experiments.mutants import ROOT, describe, faulty, is_noticed, load_mutants, with_earlier

MUTANTS = load_mutants()
QUICK = [mutant for mutant in MUTANTS if mutant.quick]


def test_every_fault_has_its_place_and_its_test():
    """The text is in its file exactly once, and the test is there."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    for mutant in MUTANTS:
        compile(mutant.applied(), mutant.file, "exec")
        path, _, name = mutant.test.partition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), mutant.test


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_a_fault_is_noticed(mutant, tmp_path):
    assert is_noticed(mutant, tmp_path)


def test_a_fault_is_taken_out_again():
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "a snapshot of the rollback's own update is good")
    watch = Watch(at=50, to=30)
    with faulty(mutant):
        assert watch.is_good(50)
    assert not watch.is_good(50)


def test_pieces_come_to_the_whole_list(tmp_path):
    """A later outcome replaces an earlier one; a fault that is listed no more goes."""
    first, second, *_ = MUTANTS
    gone = {"mutant": "gone", "file": "gone.py", "test": "gone", "outcome": "killed"}
    earlier = [gone, describe(second) | {"outcome": "killed"}, describe(first) | {"outcome": "SURVIVED"}]
    (tmp_path / "mutants.json").write_text(json.dumps({"mutants": earlier}), encoding="utf-8")
    now = [describe(first) | {"outcome": "killed"}]
    found = with_earlier(now, tmp_path / "mutants.json")
    assert [(row["mutant"], row["outcome"]) for row in found] == [(first.name, "killed"), (second.name, "killed")]
    assert with_earlier(now, tmp_path / "none.json") == now
