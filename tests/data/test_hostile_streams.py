"""Streams made to cost much, and files that change or stay silent while they are read."""

from __future__ import annotations

import json
import os
import resource
import threading

import pytest
import zstandard

from dvi_jax.config import DataConfig
from dvi_jax.data.conversations import ConversationStream, StreamLimits
from dvi_jax.data.prompts import PromptStream
from dvi_jax.errors import UserError


def record(name: object, *texts: str) -> dict:
    """A record of user messages."""
    return {"id": name, "messages": [{"role": "user", "content": text} for text in texts]}


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def ids(stream: ConversationStream) -> list[str]:
    return [conversation.id for conversation in stream]


def test_a_named_pipe_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    seen = threading.Event()

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(lines(record("a", "x")))
            seen.wait(10)
            pipe.write(lines(record("b", "x")) + b'{"id": "cut')

    stream = ConversationStream(path)
    assert not stream.is_repeatable
    writer = threading.Thread(target=write)
    writer.start()
    found = iter(stream)
    assert next(found).id == "a"  # before the writer goes on
    seen.set()
    assert [conversation.id for conversation in found] == ["b"]
    writer.join()
    assert (dict(stream.counts), stream.ends_early) == ({"cut off": 1}, True)


def test_a_file_that_shrinks_while_read(tmp_path):
    path = tmp_path / "data.jsonl"
    everything = [record(n, "x" * 1000) for n in range(3000)]  # more than one chunk of 1 MiB
    path.write_bytes(lines(*everything))
    found = iter(stream := ConversationStream(path))
    assert next(found).id == "0"
    os.truncate(path, 0)
    rest = [conversation.id for conversation in found]
    assert rest == [str(n) for n in range(1, 1 + len(rest))]
    assert 0 < len(rest) < 2999
    assert (dict(stream.counts), stream.ends_early) == ({"cut off": 1}, True)


def test_a_bomb_inside_a_record_is_counted_and_passed(tmp_path):
    """100 MB of one message in a file of a few kilobytes: dropped as it comes, what stands around it is read."""
    path = tmp_path / "bomb.zst"
    first, last = json.dumps(record("a", "x")), json.dumps(record("b", "x"))
    bomb = json.dumps(record("bomb", "x")).replace('"x"', '"' + "y" * 100_000_000 + '"')
    path.write_bytes(zstandard.compress(f"[{first},{bomb},{last}]".encode()))
    assert path.stat().st_size < 20_000
    del bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = ConversationStream(path)
    assert ids(stream) == ["a", "b"]
    assert dict(stream.counts) == {"too long": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("limit", [100_000, 16 << 20])
def test_endless_records_are_not_parsed_again_and_again(tmp_path, monkeypatch, limit):
    """Each of 300 starts could be a record; looking into every one would read the text behind it 300 times."""
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + lines(record("a", "x")) + b"," + b'{"id":[' * 300 + b'"' + b"x" * 2_000_000)
    parsed = []
    original = json.JSONDecoder.raw_decode

    def counting(self: json.JSONDecoder, text: str, at: int = 0) -> tuple[object, int]:
        parsed.append(len(text) - at)
        return original(self, text, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counting)
    stream = ConversationStream(path, limits=StreamLimits(max_record_bytes=limit))
    assert ids(stream) == ["a"]
    assert sum(parsed) < 10 * path.stat().st_size


def test_too_many_messages(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(record("a", *"xy"), record("b", *"xyz"), record("c", *"zz")))
    stream = ConversationStream(path, limits=StreamLimits(max_messages=2))
    assert ids(stream) == ["a", "c"]
    assert dict(stream.counts) == {"too long": 1}


def test_what_is_remembered_of_an_id_does_not_grow_with_it(tmp_path):
    path = tmp_path / "data.jsonl"
    big = 10**4000
    path.write_bytes(lines(record(big, "x"), record(big + 1, "x"), record(big, "y"), record("n" * 256, "x")))
    stream = ConversationStream(path)
    assert ids(stream) == [str(big), str(big + 1), "n" * 256]
    assert dict(stream.counts) == {"duplicate id": 1}
    assert {len(key) for key in stream._seen} == {12}


class CountingTokenizer:
    """Ten tokens a message; remembers how often it was asked."""

    def __init__(self):
        self.calls = 0

    def chat(self, messages: list, *, system: str | None = None) -> list[int]:
        self.calls += 1
        return [0] * 10 * len(messages)


def test_turns_behind_one_that_is_too_long_are_counted_unread(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(record("long", *["x"] * 5000), record("short", "x")))
    tokenizer = CountingTokenizer()
    settings = DataConfig(max_prompt_tokens=35, turns="all", held_out_fraction=0.0)
    stream = PromptStream(ConversationStream(path), tokenizer, settings)
    assert [(p.conversation_id, len(p.ids)) for p in stream] == [
        ("long", 10),
        ("long", 20),
        ("long", 30),
        ("short", 10),
    ]
    assert stream.counts == {"prompt too long": 4997}
    assert tokenizer.calls == 5
    resumed = PromptStream(ConversationStream(path), tokenizer, settings, state=stream.state())
    assert list(resumed) == []


def test_an_endless_device_is_no_question_file(tmp_path):
    from dvi_jax.evaluate.spec_bench import read_questions

    with pytest.raises(UserError, match="longer than 16 MiB"):
        read_questions("/dev/zero")
