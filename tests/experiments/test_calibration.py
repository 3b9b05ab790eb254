"""The calibration experiment: what it fits to stays apart from what it reads, and what it finds is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from dvi_jax.checkpoint import read_checkpoint, rewrite_checkpoint
from dvi_jax.errors import UserError
from dvi_jax.loading import load, trained_parts
from dvi_jax.trained_parts import read_trained_parts
from experiments import calibration

FITTED = ("one", "two", "three")
KINDS = ("first", "first", "summary", "summary")  # of the conversations, one after the other


@pytest.fixture(scope="module")
def measure(byte_checkpoint, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """measure(folder, *read) fits to `FITTED`, reads replies to `read` and to a question, and gives the result."""
    drafted = tmp_path_factory.mktemp("drafted") / "checkpoint"
    model = load(byte_checkpoint)
    rewrite_checkpoint(read_checkpoint(byte_checkpoint), drafted, **trained_parts(model.params))

    def run(folder: Path, *read: str) -> dict[str, Any]:
        folder.mkdir()
        asked = [text for pair in zip_longest(FITTED[: len(read) or 1], read) for text in pair if text]
        talks = [
            {"id": f"{KINDS[n % 4]}-{n}", "messages": [{"role": "user", "content": text}]}
            for n, text in enumerate(asked)
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
        question = {"question_id": 1, "category": "writing", "turns": ["what is it?"]}
        (folder / "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
        files = ["--fit", str(folder / "log.jsonl"), "--questions", str(folder / "questions.jsonl")]
        sizes = ["--longest-prompt", "32", "--new-tokens", "12", "--batch", "3", "--draft-steps", "1"]
        out = ["--out", str(folder / "out.json"), "--write", str(folder / "calibrated")]
        assert calibration.main(["--checkpoint", str(drafted), *files, *sizes, *out]) == 0
        return json.loads((folder / "out.json").read_text(encoding="utf-8"))

    return run


def test_what_is_read_moves_no_temperature(measure, tmp_path):
    """Other conversations to read give another reading of the same temperatures, which are kept with the drafter."""
    first = measure(tmp_path / "first", "four", "five", "six")
    second = measure(tmp_path / "second", "a b c", "seven?", "eight and nine")
    assert first["readings"]["questions"] == second["readings"]["questions"]
    assert first["readings"]["conversations"] != second["readings"]["conversations"]
    question, conversations = first["readings"]["questions"], first["readings"]["conversations"]
    (draft,) = question["drafts"]
    assert 0 < draft["judged"] <= 12
    assert question["kinds"] == {"writing": question["all"]}
    assert (draft["replies"], conversations["all"]["replies"]) == (1, 3)
    assert sum(row["judged"] for row in conversations["kinds"].values()) == conversations["all"]["judged"]
    kept = read_trained_parts(tmp_path / "first" / "calibrated")
    assert kept.manifest.calibration == (draft["temperature"],)


def test_one_conversation_is_too_few(measure, tmp_path):
    with pytest.raises(UserError, match=r"one prompt of .* cannot be fitted to and measured on as well"):
        measure(tmp_path / "few")
