"""Prompts are first (or all) questions; the held-out ones never meet the trained ones; every prompt can resume."""

from __future__ import annotations

import io
import json
import random
import sys
import types
from pathlib import Path

import pytest

from dvi_jax.config import DataConfig
from dvi_jax.data.conversations import ConversationStream, Message, StreamPosition
from dvi_jax.data.prompts import PromptStream, context_of_turn, is_held_out
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError


def chat(name: str, *texts: str) -> dict:
    """A record with alternating user and assistant turns."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"id": name, "messages": turns}


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json) -> Tokenizer:
    return Tokenizer(tokenizer_json)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """200 conversations on 60 different first questions, in varying spelling."""
    chance = random.Random(0)
    records = []
    for number in range(200):
        question = f"Question {chance.randrange(60)}" + chance.choice(["", " ", "\n"])
        question = chance.choice([question, question.upper()])
        records.append(chat(f"id{number}", question, "answer", f"more {chance.randrange(3)}", "fine"))
    return write_lines(tmp_path_factory.mktemp("prompts") / "data.jsonl", records)


def texts(tokenizer, prompts) -> list[str]:
    return [tokenizer.decode(prompt.ids) for prompt in prompts]


@pytest.mark.parametrize("turns", ["first", "all"])
def test_held_out_and_trained_prompts_are_disjoint(tokenizer, path, turns):
    stream = PromptStream(
        ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=200, turns=turns, held_out_fraction=0.3)
    )
    held_out = texts(tokenizer, stream.held_out_prompts(10_000))
    trained = texts(tokenizer, stream)
    first_questions = [{" ".join(t.split("\n")[0].lower().split()) for t in side} for side in (held_out, trained)]
    assert not first_questions[0] & first_questions[1]
    assert len(first_questions[0] | first_questions[1]) > 50  # nearly all of the 60 questions, on one side or the other
    assert 5 <= len(first_questions[0]) <= 30
    assert len(set(held_out)) == len(held_out)
    per_conversation = 2 if turns == "all" else 1
    assert len(trained) == per_conversation * (200 - stream.counts["held out"])


def test_held_out_prompts_are_the_first_ones_and_leave_training_alone(tokenizer, path):
    settings = DataConfig(max_prompt_tokens=200, held_out_fraction=0.3)
    stream = PromptStream(ConversationStream(path), tokenizer, settings)
    some = stream.held_out_prompts(4)
    assert some == stream.held_out_prompts(1000)[:4]
    assert list(stream) == list(PromptStream(ConversationStream(path), tokenizer, settings))


def test_the_split_is_a_share_and_depends_on_the_salt():
    questions = [f"question {number}" for number in range(4000)]
    held_out = {question for question in questions if is_held_out(question, 0.1, "salt")}
    assert 320 < len(held_out) < 480
    assert held_out < {question for question in questions if is_held_out(question, 0.2, "salt")}
    assert held_out != {question for question in questions if is_held_out(question, 0.1, "other")}
    assert not any(is_held_out(question, 0.0, "salt") for question in questions)


@pytest.mark.parametrize("variant", ["  what is\tjax? ", "WHAT IS JAX?", "\uff37hat is jax?"])
def test_spelling_does_not_change_sides(variant):
    for number in range(50):
        assert is_held_out(variant, 0.5, str(number)) == is_held_out("What is JAX?", 0.5, str(number))


@pytest.mark.parametrize("turns", ["first", "all"])
def test_resume_after_every_prompt(tokenizer, path, turns):
    settings = DataConfig(
        max_prompt_tokens=40, turns=turns, held_out_fraction=0.3
    )  # 40: some second turns are too long
    stream = PromptStream(ConversationStream(path), tokenizer, settings)
    everything, states = [], []
    for prompt in stream:
        everything.append(prompt)
        states.append(json.dumps(stream.state()))
        assert stream.state()["position"] == prompt.position.to_json()
    final = stream.state()
    for index in range(0, len(states), 7):
        resumed = PromptStream(ConversationStream(path), tokenizer, settings, state=json.loads(states[index]))
        assert list(resumed) == everything[index + 1 :]
        assert resumed.state() == final


def test_a_position_alone_resumes_too(tokenizer, path):
    settings = DataConfig(max_prompt_tokens=200, turns="all")
    everything = list(PromptStream(ConversationStream(path), tokenizer, settings))
    start = everything[10].position
    assert start.turn == 1
    assert list(PromptStream(ConversationStream(path, start=start), tokenizer, settings)) == everything[11:]


def test_turns_have_the_context_of_the_log():
    roles = ["system", "assistant", "user", "assistant", "user"]
    messages = tuple(Message(role, str(number)) for number, role in enumerate(roles))
    assert [m.content for m in context_of_turn(messages, 0)] == ["0", "2"]
    assert [m.content for m in context_of_turn(messages, 1)] == ["0", "2", "3", "4"]


def test_prompt_text_and_length_limit(tokenizer, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [chat("a", "Hi", "x"), chat("b", "y" * 50)])
    stream = PromptStream(
        ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=40, held_out_fraction=0.0), system="S"
    )
    assert texts(tokenizer, stream) == ["System: S\nUser: Hi\nAssistant:"]
    assert stream.counts == {"prompt too long": 1}


def test_a_prompt_may_be_exactly_as_long_as_allowed(tokenizer, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [chat("a", "Hi")])
    length = len("User: Hi\nAssistant:")  # a token is a byte
    exact = PromptStream(
        ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=length, held_out_fraction=0.0)
    )
    assert len(list(exact)) == 1
    shorter = PromptStream(
        ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=length - 1, held_out_fraction=0.0)
    )
    with pytest.raises(UserError, match="no prompt of at most 18 tokens in 1 conversations read"):
        list(shorter)


def test_refused_conversations_are_counted(tokenizer_json, tmp_path):
    source = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    path = write_lines(tmp_path / "data.jsonl", [chat("a", "no"), chat("b", "yes")])
    tokenizer = Tokenizer(tokenizer_json, source)
    stream = PromptStream(ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=10, held_out_fraction=0.0))
    assert texts(tokenizer, stream) == ["yes"]
    assert stream.counts == {"refused by the chat template": 1}


def test_stdin_gives_no_held_out_prompts(tokenizer, monkeypatch):
    stdin = io.BufferedReader(io.BytesIO(b"One question\nAnother\n"))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=stdin))
    stream = PromptStream(ConversationStream("-"), tokenizer, DataConfig(max_prompt_tokens=100, held_out_fraction=0.0))
    with pytest.raises(UserError, match="held-out prompts cannot be taken from stdin"):
        stream.held_out_prompts(1)
    assert texts(tokenizer, stream) == ["User: One question\nAssistant:", "User: Another\nAssistant:"]


def test_settings_and_states_are_checked(tokenizer, path):
    for bad, message in (
        ({"turns": "last"}, "turns must be first or all, got 'last'"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**{"max_prompt_tokens": 5, **bad})
    position = StreamPosition().to_json()
    for state in (
        [],
        {"position": position},
        {"position": position, "given": -1, "counts": {}},
        {"position": position, "given": 0, "counts": {"held out": "many"}},
        {"position": {"file": 0}, "given": 0, "counts": {}},
    ):
        with pytest.raises(UserError, match=r"state of a prompt stream|a stream position"):
            PromptStream(ConversationStream(path), tokenizer, DataConfig(max_prompt_tokens=5), state=state)
