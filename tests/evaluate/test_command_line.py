"""The whole command on a tiny model, its numbers recomputed from its traces, and its one-line errors."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dvi_jax.checkpoint import read_checkpoint, rewrite_checkpoint
from dvi_jax.errors import UserError, run_cli
from dvi_jax.evaluate import __main__ as command
from dvi_jax.evaluate.runner import EARLIER_TURN, TOO_LONG, PairedDecoder
from dvi_jax.evaluate.trace import PLAIN
from dvi_jax.loading import load

SAME = ("question_id", "turn", "mode", "prompt_tokens", "drafted", "accept_lengths", "new_ids", "finish_reason")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluation(checkpoint, questions_file, tmp_path_factory) -> Path:
    """One finished run over all questions of conftest.py."""
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--checkpoint", checkpoint, "--questions", questions_file, "--out", out, "--max-new-tokens", 20]
    assert command.main([str(argument) for argument in arguments]) == 0
    return out


def test_drafts_as_in_training_unless_told(checkpoint, questions_file, tmp_path, monkeypatch):
    """What training recorded in the manifest; the fixture's drafter passes for a trained one."""
    found = read_checkpoint(checkpoint)
    trained = tmp_path / "trained"
    rewrite_checkpoint(found, trained, manifest=replace(found.manifest, draft_steps=2))
    monkeypatch.setattr(command, "load_model", lambda options: replace(load(trained), drafter_is_trained=True))
    seen = []

    class Enough(Exception):  # noqa: N818
        pass

    def look(decoder, *_):
        seen.append(decoder.settings.draft_steps)
        raise Enough

    monkeypatch.setattr(command, "evaluate", look)
    for told in ([], ["--draft-steps", "1"]):
        with pytest.raises(Enough):
            command.main(
                [
                    "--checkpoint",
                    str(trained),
                    "--questions",
                    str(questions_file),
                    "--out",
                    str(tmp_path / "out"),
                    *told,
                ]
            )
    assert seen == [2, 1]


def test_another_process_than_the_first_decodes_along_and_writes_nothing(
    checkpoint, questions_file, tmp_path, monkeypatch, capsys
):
    """It takes part in every exchange, so it goes through all questions, whatever lies in its folder."""
    decoded = []

    class Along:
        def run(self, questions):
            for question in questions:
                decoded.append(question.question_id)
                yield None

    monkeypatch.setattr(command, "is_first", lambda: False)
    monkeypatch.setattr(command, "PairedDecoder", lambda *_: Along())
    monkeypatch.setattr(command, "first_prompt", lambda *_: [1])
    arguments = ["--checkpoint", checkpoint, "--questions", questions_file, "--out", tmp_path]
    (tmp_path / "of the first").touch()
    assert command.main([str(argument) for argument in arguments]) == 0
    assert decoded == [1, 2, "three", 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["of the first"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "2"], "with --batch several processes decode on one mesh of all their devices: add --mesh data=N"),
        (["--plan", "auto"], "several processes must do alike: name a --plan other than auto"),
        (["--adaptive"], "several processes must do alike: .* leave out --adaptive"),
    ],
)
def test_what_several_processes_cannot_do(checkpoint, questions_file, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(command, "one_of_several", lambda _: nullcontext())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    arguments = ["--checkpoint", checkpoint, "--questions", questions_file, "--out", tmp_path / "out", *options]
    with pytest.raises(UserError, match=said):
        command.main([*map(str, arguments), "--coordinator", "h:1", "--processes", "2", "--process-id", "0"])


def test_every_file_is_there(evaluation):
    names = {"answers.jsonl", "answers_plain.jsonl", "traces.jsonl", "metrics.jsonl", "summary.json", "report.html"}
    assert {path.name for path in evaluation.iterdir()} == names


def test_traces_hold_both_modes_of_every_turn_asked(evaluation):
    asked = [(trace["question_id"], trace["turn"], trace["mode"]) for trace in lines(evaluation / "traces.jsonl")]
    turns = [(1, 0), (1, 1), (2, 0), ("three", 0), (5, 0)]
    assert asked == [(*turn, mode) for turn in turns for mode in ("plain", "speculative", "fastest_plain")]


def test_summary_agrees_with_the_traces(evaluation):
    """Recomputed from the file alone, round by round."""
    summary = json.loads((evaluation / "summary.json").read_text())
    traces = lines(evaluation / "traces.jsonl")
    speculative = [trace for trace in traces if trace["mode"] == "speculative"]
    plain = [trace for trace in traces if trace["mode"] == "plain"]
    for label, row in [("overall", summary["overall"]), *summary["categories"].items()]:
        mine = [trace for trace in speculative if label in ("overall", trace["category"])]
        theirs = [trace for trace in plain if label in ("overall", trace["category"])]
        rounds = [pair for trace in mine for pair in zip(trace["drafted"], trace["accept_lengths"], strict=True)]
        assert row["tokens_per_round"] == pytest.approx(sum(accept for _, accept in rounds) / len(rounds))
        fates = [(i, i < accept - 1) for drafted, accept in rounds for i in range(drafted) if i <= accept - 1]
        assert row["accept_rate"] == pytest.approx(sum(ok for _, ok in fates) / len(fates))
        for position in range(3):
            mine_here = [ok for i, ok in fates if i == position]
            expected = sum(mine_here) / len(mine_here) if mine_here else None
            assert row["accept_rate_per_position"][position] == (expected and pytest.approx(expected))
        assert row["accept_length_histogram"] == [[a for _, a in rounds].count(length) for length in (1, 2, 3, 4)]
        for mode, side in (("plain", theirs), ("speculative", mine)):
            tokens = sum(len(trace["new_ids"]) - 1 for trace in side)
            assert row[mode]["tokens_per_second"] == pytest.approx(tokens / sum(trace["seconds"] for trace in side))
        same = [one["new_ids"] == other["new_ids"] for one, other in zip(mine, theirs, strict=True)]
        assert row["identical_generations"] == sum(same) == len(same)
    assert summary["overall"]["identical_questions"] == summary["overall"]["questions"] == 4


def test_skipped_turns_are_in_the_summary(evaluation):
    skipped = json.loads((evaluation / "summary.json").read_text())["skipped"]
    assert skipped == {"turns": 3, "questions_not_asked": 1, "reasons": {TOO_LONG: 2, EARLIER_TURN: 1}}


def test_answers_are_the_traces_decoded(evaluation, model):
    answers = {answer["question_id"]: answer for answer in lines(evaluation / "answers.jsonl")}
    assert list(answers) == [1, 2, "three", 5]
    for trace in lines(evaluation / "traces.jsonl"):
        if trace["mode"] == "speculative":
            choice = answers[trace["question_id"]]["choices"][0]
            assert choice["turns"][trace["turn"]] == model.tokenizer.decode(trace["new_ids"])
            assert choice["new_tokens"][trace["turn"]] == len(trace["new_ids"])
    plain = lines(evaluation / "answers_plain.jsonl")
    assert [a["choices"][0]["turns"] for a in plain] == [a["choices"][0]["turns"] for a in answers.values()]


def test_metrics_have_a_line_per_question_and_the_summary(evaluation):
    metrics = lines(evaluation / "metrics.jsonl")
    assert [(metric["kind"], metric["step"]) for metric in metrics] == [
        *[("question", step) for step in (1, 2, 3, 4, 5)],
        ("summary", 5),
    ]
    summary = json.loads((evaluation / "summary.json").read_text())
    assert metrics[-1]["tokens_per_round"] == summary["overall"]["tokens_per_round"]
    assert metrics[3]["skipped"] == [{"turn": 0, "reason": TOO_LONG}]


def test_many_at_a_time_are_the_same_generations(evaluation, checkpoint, questions_file, tmp_path):
    """Round by round, in every mode; and the same turns are left out."""
    arguments = ["--checkpoint", checkpoint, "--questions", questions_file, "--max-new-tokens", 20, "--batch", 2]
    assert command.main([str(argument) for argument in [*arguments, "--out", tmp_path / "out"]]) == 0
    of_one, of_many = (
        [{name: value for name, value in trace.items() if name in SAME} for trace in lines(out / "traces.jsonl")]
        for out in (evaluation, tmp_path / "out")
    )
    assert of_one == of_many
    one, many = (json.loads((out / "summary.json").read_text()) for out in (evaluation, tmp_path / "out"))
    assert one["skipped"] == many["skipped"]
    assert (many["settings"]["batch"], many["settings"]["row_class"]) == (2, "2x4")
    assert all(trace["seconds"] > 0 for trace in lines(tmp_path / "out" / "traces.jsonl"))


def test_limit_takes_the_first_questions(checkpoint, questions_file, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--questions", str(questions_file), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--limit", "2", "--max-new-tokens", "20"]) == 0
    assert [answer["question_id"] for answer in lines(tmp_path / "out" / "answers.jsonl")] == [1, 2]
    assert "identical outputs: 2 of 2 questions" in capsys.readouterr().out


class Tampering(PairedDecoder):
    """Changes the last token of every plain generation."""

    def decode(self, prompt, turn):
        timed = super().decode(prompt, turn)
        generation = timed[PLAIN].generation
        other = replace(generation, new_ids=[*generation.new_ids[:-1], generation.new_ids[-1] ^ 1])
        return timed | {PLAIN: replace(timed[PLAIN], generation=other)}


def test_an_answer_that_differs_fails_the_command(checkpoint, questions_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PairedDecoder", Tampering)
    arguments = ["--checkpoint", str(checkpoint), "--questions", str(questions_file), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--limit", "1", "--max-new-tokens", "20"]) == 1
    assert "identical outputs: 0 of 1 questions" in capsys.readouterr().out
    differences = json.loads((tmp_path / "out" / "summary.json").read_text())["differences"]
    assert [(each["question_id"], each["turn"]) for each in differences] == [(1, 0), (1, 1)]
    assert "Answers that differ" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--questions": "none.jsonl"}, "no question file at none.jsonl"),
        ({"--checkpoint": "nowhere"}, "no checkpoint at nowhere"),
        ({"--limit": "0"}, "--limit must be at least 1, got 0"),
        ({"--limit": "two"}, "argument --limit: invalid int value: 'two'"),
        ({"--draft-steps": "0"}, "a plan that drafts is needed"),
        ({"--plan": "plain"}, "a plan that drafts is needed"),
        ({"--plan": "tree"}, "plan 'tree': it must be plain, chain:N, block:N, tree:ROWS[xLEVELS] or early-exit:N"),
        ({"--plan": "block:2"}, "plan block:2: drafter exit_head takes chain:N, tree:ROWS or early-exit:N"),
        ({"--draft-steps": "17"}, "draft_steps must be between 0 and 16, got 17"),
        ({"--threshold": "nan"}, "threshold must be 0 or above, got nan"),
        ({"--max-new-tokens": "0"}, "max_new_tokens must be at least 1, got 0"),
        ({"--max-new-tokens": "160"}, "none of the 5 questions can be asked; the first: prompt and new tokens"),
        ({"--exit-layer": "4"}, "exit_layer must be between 1 and 1"),
        ({"--no-such-flag": "1"}, "unrecognized arguments: --no-such-flag 1"),
    ],
)
def test_bad_input_is_one_line(checkpoint, questions_file, tmp_path, capsys, monkeypatch, changes, complaint):
    out = tmp_path / "out"
    options = {"--checkpoint": str(checkpoint), "--questions": str(questions_file), "--out": str(out)} | changes
    arguments = [part for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    assert run_cli(lambda: command.main(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert complaint in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(checkpoint, questions_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    arguments = ["--checkpoint", str(checkpoint), "--questions", str(questions_file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    assert run_cli(lambda: command.main(arguments)) == 2
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_matplotlib_the_command_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--checkpoint", "nowhere", "--questions", "none", "--out", "out"]
    assert run_cli(lambda: command.main(arguments)) == 2
    assert "pip install 'dvi-jax[plots]'" in capsys.readouterr().err
