"""Every number of a summary against values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dvi_jax.evaluate.runner import EARLIER_TURN, TOO_LONG, Skipped
from dvi_jax.evaluate.summary import measure, summarise


@pytest.fixture
def turns(make_turn):
    return [
        # 8 tokens in 2 rounds, 4 s against 2 s
        make_turn([(3, 4), (3, 4)], question_id=1, category="writing", seconds=(4, 2)),
        # 3 tokens in 2 rounds, 3 s against 6 s
        make_turn([(3, 2), (3, 1)], question_id=2, category="coding", seconds=(3, 6)),
        # 1 token in a round that drafted nothing (the limit), 2 s against 1 s
        make_turn([(0, 1)], question_id=2, category="coding", turn=1, seconds=(2, 1)),
        # nothing decoded after the prefill
        make_turn([], question_id=3, category="qa", seconds=(0.25, 0.25)),
    ]


def test_overall_by_hand(turns):
    overall = measure(turns, 3)
    assert (overall["questions"], overall["generations"], overall["rounds"]) == (3, 4, 5)
    assert overall["tokens_per_round"] == pytest.approx(12 / 5)
    assert (overall["drafted"], overall["judged"], overall["accepted"]) == (12, 9, 7)
    assert overall["accept_rate"] == pytest.approx(7 / 9)
    assert overall["judged_per_position"] == [4, 3, 2]
    assert overall["accept_rate_per_position"] == pytest.approx([3 / 4, 2 / 3, 1])
    assert overall["ctar"] == pytest.approx([3 / 4, 2 / 4, 2 / 4])
    assert overall["accept_length_histogram"] == [2, 1, 0, 2]


def test_speed_is_total_tokens_over_total_seconds(turns):
    overall = measure(turns, 3)
    assert overall["plain"]["tokens"] == overall["speculative"]["tokens"] == 12
    assert overall["plain"]["tokens_per_second"] == pytest.approx(12 / 9.25)
    assert overall["speculative"]["tokens_per_second"] == pytest.approx(12 / 9.25)
    assert overall["speedup"] == pytest.approx(1.0)
    assert overall["median_speedup"] == pytest.approx(2.0)  # of 2, 0.5 and 2; the empty answer has none
    # 16 tokens with the prefills', each of which took half a second.
    assert overall["plain"]["tokens_per_second_with_prefill"] == pytest.approx(16 / 11.25)


def test_categories_stand_apart_and_mt_bench_together(turns):
    summary = summarise(turns, [], 3, {"drafter": "exit_head"})
    assert list(summary["categories"]) == ["writing", "coding", "qa"]
    assert summary["categories"]["writing"]["speedup"] == pytest.approx(2)
    assert summary["categories"]["coding"]["speedup"] == pytest.approx(5 / 7)
    assert summary["mt_bench"]["speedup"] == pytest.approx(1)
    assert summary["mt_bench"]["questions"] == 2
    assert "mt_bench" not in summarise(turns[:1], [], 3, {})
    assert summary["settings"] == {"drafter": "exit_head"}


def test_what_was_not_counted_is_none_not_zero(turns):
    empty = summarise(turns, [], 3, {})["categories"]["qa"]
    for key in ("tokens_per_round", "accept_rate", "speedup", "median_speedup"):
        assert empty[key] is None
    assert empty["accept_rate_per_position"] == empty["ctar"] == [None, None, None]
    json.dumps(empty, allow_nan=False)


def test_one_different_turn_spoils_its_question(make_turn):
    turns = [
        make_turn([(3, 2)], question_id=1),
        make_turn([(3, 2)], question_id=1, turn=1, plain_ids=[0, 1, 9]),
        make_turn([(3, 2)], question_id=2),
    ]
    summary = summarise(turns, [], 3, {})
    assert (summary["overall"]["identical_questions"], summary["overall"]["questions"]) == (1, 2)
    assert summary["overall"]["identical_generations"] == 2
    assert summary["differences"] == [{"question_id": 1, "turn": 1, "first_difference": 2}]


def test_skipped_turns_are_counted_by_reason(turns):
    skipped = [Skipped(7, 0, TOO_LONG), Skipped(7, 1, EARLIER_TURN), Skipped(2, 2, TOO_LONG)]
    assert summarise(turns, skipped, 3, {})["skipped"] == {
        "turns": 3,
        "questions_not_asked": 1,
        "reasons": {TOO_LONG: 2, EARLIER_TURN: 1},
    }


def test_the_fastest_plain_decoding_stands_apart(turns):
    """Twice as fast as plain of equal width; one of its answers differs."""
    narrow = [replace(turn.plain, mode="fastest_plain", seconds=turn.plain.seconds / 2) for turn in turns]
    narrow[0] = replace(narrow[0], new_ids=[*narrow[0].new_ids[:-1], 99])
    overall = measure([replace(turn, narrow=trace) for turn, trace in zip(turns, narrow, strict=True)], 3)
    assert overall["fastest_plain"]["tokens_per_second"] == pytest.approx(2 * 12 / 9.25)
    assert overall["speedup_over_fastest"] == pytest.approx(0.5)
    assert overall["speedup"] == pytest.approx(1.0)
    assert overall["median_speedup_over_fastest"] == pytest.approx(1.0)  # of 1, 0.25 and 1
    assert overall["median_speedup"] == pytest.approx(2.0)
    assert overall["fastest_plain_identical"] == 3
    assert overall["identical_generations"] == 4
    alone = measure(turns, 3)
    assert alone["fastest_plain"] == alone["plain"]
