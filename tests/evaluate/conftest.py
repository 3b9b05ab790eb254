"""A tiny random checkpoint that speaks bytes, and turns made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE, Trace, Turn
from dvi_jax.loading import LoadedModel, load
from experiments.tiny import write_tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
CONTEXT = 160
# First turns are alike in length, so that they share one compiled program.
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a long word.", "Another."]},
    {"question_id": 2, "category": "coding", "turns": ["def function(x):"], "reference": ["ignored"]},
    {"question_id": "three", "category": "qa", "turns": ["Where is the moon?"]},
    {"question_id": 4, "category": "qa", "turns": ["x" * CONTEXT]},
    {"question_id": 5, "category": "writing", "turns": ["Write a short word.", "y" * CONTEXT, "never asked"]},
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model whose drafter is right about half of the time."""
    path = tmp_path_factory.mktemp("evaluate") / "tiny"
    write_tiny_model(path, context=CONTEXT, layers=2, chat_template=CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def model(checkpoint) -> LoadedModel:
    return load(checkpoint)


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def make_turn() -> Callable[..., Turn]:
    """Turns from (drafted, accept_length) pairs; seconds are of the plain and of the speculative run.

    `fastest`: seconds and ids of the fastest plain run; None: it is the plain one.
    """

    def make(
        rounds: Sequence[tuple[int, int]],
        *,
        question_id: int | str = 1,
        category: str = "qa",
        turn: int = 0,
        seconds: tuple[float, float] = (1.0, 1.0),
        prefill: float = 0.5,
        plain_ids: list[int] | None = None,
        fastest: tuple[float, list[int]] | None = None,
    ) -> Turn:
        ids = list(range(1 + sum(length for _, length in rounds)))
        plain_ids = ids if plain_ids is None else plain_ids
        same = (question_id, category, turn)
        tail = ("length", prefill)

        def plain(mode: str, new_ids: list[int], took: float) -> Trace:
            ones = [1] * (len(new_ids) - 1)
            return Trace(*same, mode, mode == PLAIN, 7, 32, [0] * len(ones), ones, new_ids, *tail, took)

        return Turn(
            plain(PLAIN, plain_ids, seconds[0]),
            Trace(
                *same, SPECULATIVE, False, 7, 32, [d for d, _ in rounds], [a for _, a in rounds], ids, *tail, seconds[1]
            ),
            None if fastest is None else plain(FASTEST, fastest[1], fastest[0]),
        )

    return make
