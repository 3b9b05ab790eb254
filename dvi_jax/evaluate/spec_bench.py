"""Spec-Bench files: reading questions, and the answer lines its own tools read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvi_jax.data.records import Damaged, parse_json
from dvi_jax.errors import UserError
from dvi_jax.evaluate.trace import Trace

# Spec-Bench reports these categories, which come from MT-Bench, as one task.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_BYTES = 16 << 20  # Spec-Bench's own file has 1 MiB


@dataclass(frozen=True)
class Question:
    """One conversation to hold: the user's messages in order."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a JSONL file (`question_id`, `category`, `turns`; other keys are ignored).

    Raises `UserError` naming the first line that is no question or repeats an id, or the file if it has none.
    """
    questions: list[Question] = []
    first_seen: dict[int | str, int] = {}
    for number, line in enumerate(_read(path).removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}, line {number}")
        earlier = first_seen.setdefault(question.question_id, number)
        if earlier != number:
            raise UserError(f"{path}, line {number}: question_id {question.question_id!r} is already on line {earlier}")
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no questions; expected one JSON object a line")
    return questions


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256: says which questions a result is about."""
    return hashlib.sha256(_read(path)).hexdigest()


def answer_line(question: Question, model_id: str, texts: Sequence[str], traces: Sequence[Trace]) -> dict[str, Any]:
    """One line of an answer file: a choice with one entry per turn; `accept_lengths` runs over all turns.

    `wall_time` holds prefill and decoding, as Spec-Bench counts it; `decode_time` decoding alone.
    """
    return {
        "question_id": question.question_id,
        "category": question.category,
        "model_id": model_id,
        "choices": [
            {
                "index": 0,
                "turns": list(texts),
                "decoding_steps": [len(trace.accept_lengths) for trace in traces],
                "new_tokens": [len(trace.new_ids) for trace in traces],
                "wall_time": [trace.prefill_seconds + trace.seconds for trace in traces],
                "decode_time": [trace.seconds for trace in traces],
                "accept_lengths": [length for trace in traces for length in trace.accept_lengths],
            }
        ],
    }


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"no question file at {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is longer than {MAX_BYTES >> 20} MiB, which no question file should be")
    return data


def _parse(line: bytes, where: str) -> Question:
    record = parse_json(line)
    if isinstance(record, Damaged):
        raise UserError(f"{where}: {record.reason}")
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with question_id, category and turns")
    for key in ("question_id", "category", "turns"):
        if key not in record:
            raise UserError(f"{where}: {key} is missing")
    question_id, category, turns = record["question_id"], record["category"], record["turns"]
    if not (type(question_id) is int or _is_text(question_id)) or len(str(question_id)) > 256:
        raise UserError(f"{where}: question_id must be a whole number or a text, of at most 256 characters")
    if not _is_text(category):
        raise UserError(f"{where}: category must be a text that is not empty")
    if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
        raise UserError(f"{where}: turns must be a list of user messages, at least one, none empty")
    return Question(question_id, category, tuple(turns))


def _is_text(value: object) -> bool:
    """A string with something in it that UTF-8 can hold (JSON can write lone surrogates)."""
    return (
        isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    )
