"""Several evaluations in one table and one picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest

from dvi_jax.errors import UserError
from dvi_jax.evaluate.summary import summarise
from experiments import compare

SETTINGS = {
    "source": "model",
    "dtype": "float32",
    "drafter": "exit_head",
    "exit_layer": 2,
    "plan": "chain:3",
    "draft_steps": 3,
    "threshold": 0.0,
    "max_new_tokens": 128,
    "questions_sha256": "abc",
    "questions_chosen": 2,
    "device": "cpu",
}


FASTEST = (2.0, list(range(9)))


@pytest.fixture
def write(tmp_path, make_turn):
    """Folders with a summary.json: `seconds` is the speculative time of 8 tokens that plain took 4 s and 2 s for."""

    def make(name: str, seconds: float, **settings) -> Path:
        turns = [
            make_turn([(3, 4), (3, 4)], question_id=1, category="qa", seconds=(4, seconds), fastest=FASTEST),
            make_turn([(3, 1)], question_id=2, category="a|b", seconds=(1, 1)),
        ]
        (tmp_path / name).mkdir()
        summary = summarise(turns, [], 3, SETTINGS | settings)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        return tmp_path / name

    return make


def cells(text: str, first: str) -> list[list[str]]:
    """The table rows that begin with `first`."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first]


def test_tables_by_hand(write):
    summaries = compare.read_summaries([str(write("fast", 1)), f"slow one={write('slow', 8)}/summary.json"])
    text = compare.overview(summaries)
    # fast: 9 tokens in 3 rounds; fastest plain 9 / 3 s, plain 9 / 5 s, speculative 9 / 2 s.
    numbers = ["3.00", "85.7%", "3.0", "1.8", "4.5", "1.50", "2.50", "2 of 2"]
    assert cells(text, "fast") == [["fast", "exit_head", "2", "chain:3", "3", "0.0", *numbers]]
    assert cells(text, "slow one")[0][-3:-1] == ["0.33", "0.56"]
    assert cells(text, "qa") == [["qa", "2.00", "0.25"], ["qa", "4.00", "0.50"], ["qa", "4.00", "4.00"]]
    assert cells(text, "a\\|b")[0] == ["a\\|b", "1.00", "1.00"]
    assert "Not directly comparable" not in text


def test_unlike_measurements_are_said_to_be_so(write):
    summaries = compare.read_summaries([str(write("one", 1)), str(write("two", 1, device="gpu", dtype="bfloat16"))])
    assert "**Not directly comparable**: these evaluations differ in dtype, device." in compare.overview(summaries)


def test_an_evaluation_without_the_fastest_plain_has_a_dash_for_it(write):
    """As results that were kept from before it was measured."""
    path = write("old", 1) / "summary.json"
    old = json.loads(path.read_text())
    del old["settings"]["plan"]
    for row in (old["overall"], *old["categories"].values()):
        for key in [key for key in row if "fastest" in key]:
            del row[key]
    path.write_text(json.dumps(old))
    (row,) = cells(compare.overview(compare.read_summaries([str(path)])), "old")
    assert row[3] == row[8] == row[11] == "-"
    assert row[9:11] == ["1.8", "4.5"]


def test_the_command_writes_table_and_picture(write, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare.main([str(write("one", 1)), str(write("two", 2)), "--out", str(out)]) == 0
    assert (out / "comparison.md").read_text() == capsys.readouterr().out
    pixels = matplotlib.image.imread(out / "comparison.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.01


def test_bad_evaluations_are_named(write, tmp_path):
    good = write("good", 1)
    with pytest.raises(UserError, match="two evaluations are called 'good'"):
        compare.read_summaries([str(good), str(good)])
    with pytest.raises(UserError, match=r"none.*is missing"):
        compare.read_summaries([str(tmp_path / "none")])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text('{"format_version": 0}')
    with pytest.raises(UserError, match="is not a summary of format 1"):
        compare.read_summaries([str(tmp_path / "old")])
