"""Texts, messages and ids in, texts out: `generate_text`, files of prompts, and a conversation in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dvi_jax
from dvi_jax import DecodeConfig, Message, UserError, chat, generate_batch, generate_text, load
from dvi_jax.decode.stream import Stream
from dvi_jax.generate import main as generate

ROOT = Path(__file__).parents[1]
NEW = 8  # tokens of every reply


@pytest.fixture(scope="module")
def model(byte_checkpoint):
    return load(byte_checkpoint)


def plainly(model, text):
    """The reply's ids, by the function below all others."""
    ids = model.tokenizer.encode(text)
    (generation,), _ = generate_batch(model, [ids], DecodeConfig(draft_steps=0, max_new_tokens=NEW))
    return generation.new_ids


def test_a_prompt_in_any_form(model):
    """Without a template a conversation reads "User: ..."; the untrained drafter drafts nothing unasked."""
    text = "User: moon\nAssistant:"
    ids = model.tokenizer.encode(text)
    expected = plainly(model, text)
    forms = ["moon", [{"role": "user", "content": "moon"}], [Message("user", "moon")], ids]
    for form in forms:
        (found,) = generate_text(model, form, max_new_tokens=NEW)
        assert found.generation.new_ids == expected
        assert found.text == model.tokenizer.decode(expected)
        assert found.generation.drafted == [0] * (NEW - 1)


def test_settings_are_keywords(model):
    (drafted,) = generate_text(model, "moon", max_new_tokens=NEW, draft_steps=2)
    assert sum(drafted.generation.drafted) > 0
    (text,) = {reply.text for reply in generate_text(model, "moon", max_new_tokens=NEW)}
    (stopped,) = generate_text(model, "moon", max_new_tokens=NEW, stop=[text[2]])
    assert (stopped.text, stopped.generation.finish_reason) == (text[: text.index(text[2])], "stop")


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("moon", {"max_tokens": 3}, "unknown setting 'max_tokens': did you mean max_new_tokens?"),
        ("moon", {"temprature": 1.0}, "unknown setting 'temprature': did you mean temperature?"),
        ("moon", {"colour": 1}, "unknown setting 'colour'$"),
        ([{"role": "user"}], {}, "a message has a role and a content"),
        ([{"role": "tool", "content": "x"}], {}, r"a message has a role \(system, user, assistant\)"),
        ([1, 300], {}, "prompt ids must be between 0 and 257"),
        ([], {}, "a batch needs at least one prompt"),
    ],
)
def test_what_cannot_be(model, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        generate_text(model, prompts, **settings)


def test_ids_are_asked_for_by_name(model):
    with pytest.raises(UserError, match="a prompt is token ids here, got 'moon': generate_text takes texts"):
        generate_batch(model, ["moon"], DecodeConfig())


def test_names_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dvi_jax.__version__)
    assert (Path(dvi_jax.__file__).parent / "py.typed").is_file()


LINES = ['"moon"', '{"id": "b", "prompt": "tree"}', '{"messages": [{"role": "user", "content": "bird"}]}', "[5, 6, 7]"]


def answer(byte_checkpoint, prompts, output, *more):
    common = ["--checkpoint", str(byte_checkpoint), "--max-new-tokens", str(NEW), "--batch", "2"]
    return generate([*common, "--input", str(prompts), "--output", str(output), *more])


def test_a_file_of_prompts(model, byte_checkpoint, tmp_path, capsys):
    """Against each decoded alone; cut anywhere, the file is completed to the same bytes."""
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out" / "replies.jsonl"
    too_long = json.dumps("x" * 200)
    prompts.write_text("\n".join([*LINES, "", too_long]) + "\n", encoding="utf-8")
    assert answer(byte_checkpoint, prompts, output) == 1  # one is too long
    assert "is untrained: decoding plainly" in capsys.readouterr().err
    whole = output.read_bytes()
    replies = [json.loads(line) for line in whole.splitlines()]
    assert [reply["id"] for reply in replies] == [0, "b", 2, 3, 4]
    assert "the model's context holds 128" in replies[4]["error"]
    for reply, word in zip(replies, ("moon", "tree", "bird"), strict=False):
        assert reply["new_ids"] == plainly(model, f"User: {word}\nAssistant:")
        assert reply["text"] == model.tokenizer.decode(reply["new_ids"])
    for cut in (len(whole) - 5, len(whole) // 2, 3):
        output.write_bytes(whole[:cut])
        assert answer(byte_checkpoint, prompts, output) == 1
        assert output.read_bytes() == whole


def test_samples_of_a_file_do_not_depend_on_where_it_was_cut(byte_checkpoint, tmp_path):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "replies.jsonl"
    prompts.write_text("\n".join(["[5, 6, 7]"] * 4) + "\n", encoding="utf-8")
    sampled = ("--temperature", "1", "--seed", "4")
    assert answer(byte_checkpoint, prompts, output, *sampled) == 0
    whole = output.read_text(encoding="utf-8")
    assert len({tuple(json.loads(line)["new_ids"]) for line in whole.splitlines()}) == 4
    output.write_text(whole.splitlines(keepends=True)[0], encoding="utf-8")
    assert answer(byte_checkpoint, prompts, output, *sampled) == 0
    assert output.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize(
    ("line", "written", "message"),
    [
        ("{", "", "in.jsonl, line 1: not valid JSON"),
        ('{"text": "x"}', "", "line 1: give one of prompt, messages, prompt_ids"),
        ('{"prompt": "x", "prompt_ids": [1]}', "", "line 1: give one of"),
        ('{"prompt": 3}', "", "line 1: a conversation is a list of messages, got 3"),
        ('{"prompt": "x", "id": [1]}', "", "line 1: an id is a number or a text"),
        ("", "", "in.jsonl holds no prompt"),
        ('"x"', '{"id": 7}\n', r"answers other prompts \(line 1\): choose another --output"),
        ('"x"', "hello\n", "line 1, is no reply: choose another --output"),
    ],
)
def test_files_that_cannot_be(byte_checkpoint, tmp_path, line, written, message):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "replies.jsonl"
    prompts.write_text(line, encoding="utf-8")
    if written:
        output.write_text(written, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        answer(byte_checkpoint, prompts, output)
    assert (output.read_text(encoding="utf-8") if output.exists() else "") == written


def test_a_conversation_in_a_terminal(model, byte_checkpoint):
    """Replies are those to the conversation so far, until it is forgotten; Ctrl-D leaves."""
    first = model.tokenizer.decode(plainly(model, "System: short\nUser: moon\nAssistant:"))
    again = f"System: short\nUser: moon\nAssistant: {first}\nUser: tree\nAssistant:"
    second = model.tokenizer.decode(plainly(model, again))
    anew = model.tokenizer.decode(plainly(model, "System: short\nUser: tree\nAssistant:"))
    assert len({first, second, anew}) == 3
    terminal = Terminal(
        *(sys.executable, "-m", "dvi_jax.chat", "--checkpoint", str(byte_checkpoint)),
        *("--system", "short", "--max-new-tokens", str(NEW)),
    )
    for line, expected in (("moon", first), ("tree", second), ("/reset", "(forgotten)"), ("tree", anew)):
        shown = terminal.ask(line)
        assert expected.replace("\n", "\r\n") in shown
        assert line.startswith("/") or re.search(rf"\({NEW} tokens, .* 1\.00 tokens a round by plain\)", shown)
    assert "there is no /what" in terminal.ask("/what")
    assert terminal.leave() == 0


@pytest.fixture
def hears_ctrl_c():
    """As in a terminal: tests that run in the background are deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_the_reply_alone(model, monkeypatch, capsys, times, pieces):
    """Once or again, also while the prompt is still taken in: what was said is kept, and the conversation goes on."""

    def interrupted(*arguments, **options):
        return Interrupted(Stream(*arguments, **options), pieces, times)

    talk = chat.Conversation(model, DecodeConfig(draft_steps=0, max_new_tokens=NEW), None, (), "short")
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(chat, "Stream", interrupted)
        chat.obey_or_reply(talk, "moon")
    shown = capsys.readouterr().out
    assert shown.endswith(" [ended]\n")
    assert bool(shown.removesuffix(" [ended]\n")) == bool(pieces)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [message.content for message in talk.messages[:1]] == (["moon"] if pieces and times == 1 else [])
    talk.reset()
    chat.obey_or_reply(talk, "tree")
    anew = model.tokenizer.decode(plainly(model, "System: short\nUser: tree\nAssistant:"))
    assert [message.content for message in talk.messages] == ["tree", anew]


class Interrupted:
    """A stream during which Ctrl-C is typed, so many times, after so many pieces with text; 0: while it is made."""

    def __init__(self, stream: Stream, pieces: int, times: int):
        self._stream, self._pieces, self._times = stream, pieces, times
        self.generations = stream.generations
        if not pieces:
            self._type()

    def __iter__(self):
        assert self._pieces, "nothing more is asked for"
        shown = 0
        for pieces in self._stream:
            if shown == self._pieces:
                self._type()
            yield pieces
            shown += any(piece.text for piece in pieces)

    def _type(self):
        for _ in range(self._times):
            signal.raise_signal(signal.SIGINT)


class Terminal:
    """A program in a terminal of its own, which shows "> " where it waits."""

    def __init__(self, *command: str):
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, close_fds=True, start_new_session=True
        )
        os.close(theirs)
        self._until_prompt()

    def ask(self, line: str) -> str:
        """Type a line; what is shown until the program waits again."""
        os.write(self._ours, line.encode() + b"\n")
        return self._until_prompt()

    def leave(self) -> int:
        """Type Ctrl-D; the exit status."""
        os.write(self._ours, b"\x04")
        try:
            return self._process.wait(timeout=60)
        finally:
            self._process.kill()
            os.close(self._ours)

    def _until_prompt(self) -> str:
        shown, deadline = b"", time.monotonic() + 240
        while not shown.endswith(b"> "):
            assert time.monotonic() < deadline, shown
            shown += os.read(self._ours, 4096)
        return shown.decode()
