"""Question files: what is read, and the one line about the first thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvi_jax.errors import UserError
from dvi_jax.evaluate.spec_bench import Question, answer_line, read_questions

GOOD = '{"question_id": 1, "category": "qa", "turns": ["Hello?"]}'


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return path


def test_questions_keep_their_order_and_ignore_other_keys(tmp_path):
    second = '{"reference": [1], "turns": ["a", "b"], "category": "math", "question_id": "x", "extra": {}}'
    path = write(tmp_path / "q.jsonl", "\ufeff" + GOOD, "", "  ", second + "\r", "")
    assert read_questions(path) == [Question(1, "qa", ("Hello?",)), Question("x", "math", ("a", "b"))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: invalid JSON"),
        ("\udcff", "line 2: invalid UTF-8"),
        ("[1]", "line 2: expected an object"),
        ('{"question_id": 2, "turns": ["a"]}', "line 2: category is missing"),
        ('{"category": "qa", "turns": ["a"]}', "line 2: question_id is missing"),
        ('{"question_id": 2, "category": "qa"}', "line 2: turns is missing"),
        ('{"question_id": true, "category": "qa", "turns": ["a"]}', "line 2: question_id must be"),
        ('{"question_id": 1.5, "category": "qa", "turns": ["a"]}', "line 2: question_id must be"),
        ('{"question_id": 2, "category": "", "turns": ["a"]}', "line 2: category must be"),
        ('{"question_id": 2, "category": 3, "turns": ["a"]}', "line 2: category must be"),
        ('{"question_id": 2, "category": "qa", "turns": []}', "line 2: turns must be"),
        ('{"question_id": 2, "category": "qa", "turns": "a"}', "line 2: turns must be"),
        ('{"question_id": 2, "category": "qa", "turns": ["a", " "]}', "line 2: turns must be"),
        ('{"question_id": 2, "category": "qa", "turns": ["\\ud800"]}', "line 2: turns must be"),
        (GOOD, "line 2: question_id 1 is already on line 1"),
        ("[" * 100_000, "line 2: invalid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "q.jsonl", GOOD, line)
    with pytest.raises(UserError, match=complaint):
        read_questions(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write(tmp_path / "q.jsonl", content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no question file at"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_questions(tmp_path)


def test_answer_lines_have_the_fields_that_spec_bench_reads(make_turn):
    """Its speed.py sums `new_tokens` and `wall_time` of choice 0 and pools `accept_lengths`."""
    turns = [make_turn([(3, 4), (3, 1)], seconds=(9, 2)), make_turn([(3, 2)], turn=1, seconds=(9, 1))]
    question = Question(1, "qa", ("a", "b"))
    line = json.loads(json.dumps(answer_line(question, "m", ["A", "B"], [turn.speculative for turn in turns])))
    assert (line["question_id"], line["category"], line["model_id"]) == (1, "qa", "m")
    (choice,) = line["choices"]
    assert choice["turns"] == ["A", "B"]
    assert choice["new_tokens"] == [6, 3]
    assert choice["decoding_steps"] == [2, 1]
    assert choice["accept_lengths"] == [4, 1, 2]
    assert choice["wall_time"] == [2.5, 1.5]
