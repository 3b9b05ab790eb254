"""Traces: their lines hold everything, and the first difference between two modes is found."""

from __future__ import annotations

import json

import pytest

from dvi_jax.errors import UserError
from dvi_jax.evaluate.trace import LinesFile, Trace, trace_line


def test_traces_round_trip_through_the_file(tmp_path, make_turn):
    turn = make_turn([(3, 2), (3, 4)], question_id="b", turn=1)
    with LinesFile(tmp_path / "traces.jsonl") as file:
        file.append(trace_line(turn.plain))
        file.append(trace_line(turn.speculative))
    lines = (tmp_path / "traces.jsonl").read_text().splitlines()
    assert [Trace(**json.loads(line)) for line in lines] == [turn.plain, turn.speculative]


def test_lines_are_on_the_disk_before_the_file_is_closed(tmp_path):
    with LinesFile(tmp_path / "lines.jsonl") as file:
        file.append({"a": 1})
        assert (tmp_path / "lines.jsonl").read_text() == '{"a": 1}\n'


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*lines\.jsonl"):
        LinesFile(tmp_path / "none" / "lines.jsonl")


@pytest.mark.parametrize(
    ("plain_ids", "first"),
    [([0, 1, 2], None), ([0, 9, 2], 1), ([0, 1], 2), ([0, 1, 2, 3], 3), ([5, 1, 2], 0)],
)
def test_first_difference(make_turn, plain_ids, first):
    turn = make_turn([(3, 2)], plain_ids=plain_ids)  # the speculative ids are 0, 1, 2
    assert turn.first_difference() == first
    assert turn.identical == (first is None)
