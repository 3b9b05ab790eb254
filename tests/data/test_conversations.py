"""Every format is read, every whole conversation survives damage, every skip is counted, every position resumes."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi_jax.data.conversations import ConversationStream, Message, StreamLimits, StreamPosition
from dvi_jax.errors import UserError


def sharegpt(name: str, *texts: str) -> dict:
    """A record with alternating human and gpt turns."""
    speakers = ["human", "gpt"] * len(texts)
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)]
    return {"id": name, "conversations": turns}


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


RECORDS = [
    sharegpt("first", "Hi", "Hello \u00e9\U0001f600"),
    sharegpt("second", 'Quote "}, {\\"id\\": [', "Braces }]"),
    sharegpt("third", "Third\nquestion", "Yes", "And?", "No"),
]
EXPECTED = [(record["id"], [turn["value"] for turn in record["conversations"]]) for record in RECORDS]


def read(*paths, **options) -> tuple[list, ConversationStream]:
    """What a stream gives, as (id, texts), and the stream."""
    stream = ConversationStream([str(path) for path in paths], **options)
    return [(c.id, [message.content for message in c.messages]) for c in stream], stream


def as_messages(record: dict) -> dict:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
    return {"id": record["id"], "messages": turns}


FORMATS = {
    "array": json.dumps(RECORDS),
    "indented array": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "lines of conversations": "\n".join(json.dumps(record) for record in RECORDS),
    "lines of messages": "\n\n".join(json.dumps(as_messages(record)) for record in RECORDS) + "\n",
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "byte order mark": "\ufeff" + json.dumps(RECORDS),
}
PACKINGS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "two gzip members": lambda data: gzip.compress(data[:40]) + b"\0" * 5 + gzip.compress(data[40:]),
    "two zstd frames": lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:]),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_conversations(tmp_path, form, packing):
    path = tmp_path / "data"  # without an ending: the content decides
    path.write_bytes(PACKINGS[packing](FORMATS[form].encode()))
    conversations, stream = read(path)
    assert conversations == EXPECTED
    assert (stream.read, dict(stream.counts), stream.ends_early) == (3, {}, False)


def test_text_lines_are_user_messages(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("What is [this]?\n\n{curly} text\nLast without newline")
    conversations = list(ConversationStream(path))
    texts = ["What is [this]?", "{curly} text", "Last without newline"]
    assert [c.messages for c in conversations] == [(Message("user", text),) for text in texts]
    assert len({c.id for c in conversations}) == 3


def test_roles_are_normalised(tmp_path):
    names = [
        "system",
        "human",
        "GPT",
        "user",
        "chatgpt",
        "human",
        "bing",
        "user",
        "bard",
        "user",
        "assistant",
    ]
    record = {"id": "r", "conversations": [{"from": name, "value": "x"} for name in names]}
    (conversation,) = ConversationStream(write_lines(tmp_path / "a.jsonl", [record]))
    assert [message.role for message in conversation.messages] == ["system", *["user", "assistant"] * 5]


def test_stdin(monkeypatch):
    stdin = io.BufferedReader(io.BytesIO(FORMATS["array"].encode()))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=stdin))
    conversations, stream = read("-")
    assert conversations == EXPECTED
    assert not stream.is_repeatable


def test_a_resumed_pipe_goes_on_with_what_comes(monkeypatch):
    stdin = io.BufferedReader(io.BytesIO(FORMATS["array"].encode()))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=stdin))
    stream = ConversationStream("-", start=StreamPosition(0, 10))
    assert [(c.id, c.position.record) for c in stream] == [("first", 11), ("second", 12), ("third", 13)]


@pytest.mark.parametrize("form", FORMATS)
def test_cut_at_every_byte(tmp_path, form):
    """Every conversation whose last byte is there is read; a cut before the end is noticed."""
    data = FORMATS[form].encode()
    ends = _record_ends(data)
    for cut in range(1, len(data)):
        path = tmp_path / "cut.json"
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        stream = ConversationStream(path)
        found = []
        try:
            found += [c.id for c in stream]
        except UserError:
            assert whole == 0
        assert found == ["first", "second", "third"][:whole], cut
        if "array" in form:
            is_closed = data[:cut].rstrip().endswith(b"]") and whole == 3
            assert stream.ends_early or is_closed or whole == 0, cut


def _record_ends(data: bytes) -> list[int]:
    """The offset just behind each top-level object, by counting braces outside strings."""
    depth, in_string, escaped, ends = 0, False, False, []
    for offset, byte in enumerate(data.decode("latin-1"), 1):
        if in_string:
            in_string, escaped = escaped or byte != '"', byte == "\\" and not escaped
        elif byte == '"':
            in_string = True
        elif byte in "{}":
            depth += 1 if byte == "{" else -1
            ends += [offset] if byte == "}" and depth == 0 else []
    return ends


USER = {"from": "human", "value": "fine"}
DAMAGED_LINES = {
    "invalid JSON": b'{"id": "x", "conversations": [}',
    "invalid UTF-8": b'{"id": "x", "conversations": [{"from": "human", "value": "\xff\xfe"}]}',
    "not an object": b'"text"',
    "missing field": b'{"id": "x"}',
    "wrong role": b'{"id": "x", "conversations": [{"from": "wizard", "value": "hi"}]}',
    "empty": b'{"id": "x", "conversations": []}',
    "no user message": b'{"id": "x", "conversations": [{"from": "gpt", "value": "hi"}]}',
    "duplicate id": json.dumps(RECORDS[0]).encode(),
    "wrong type": b'{"id": "x", "conversations": "hi"}',
    "too long": json.dumps(sharegpt("x", "y" * 300)).encode(),
}
MORE_DAMAGED_LINES = [
    ("missing field", {"id": "x", "conversations": None}),
    ("missing field", {"id": "x", "conversations": [USER, None]}),
    ("missing field", {"id": "x", "conversations": [{"from": "human"}]}),
    ("missing field", {"id": "x", "conversations": [{"from": None, "value": "hi"}]}),
    ("missing field", {"id": "x", "messages": [{"role": "user", "content": None}]}),
    ("wrong type", {"id": "x", "conversations": [["human", "hi"]]}),
    ("wrong type", {"id": "x", "conversations": [{"from": "human", "value": 3}]}),
    ("wrong role", {"id": "x", "conversations": [{"from": 7, "value": "hi"}]}),
    ("empty", {"id": "x", "conversations": [{"from": "human", "value": " \n"}]}),
    ("invalid UTF-8", {"id": "x", "conversations": [{"from": "human", "value": "\ud83d"}]}),
    ("invalid UTF-8", {"id": "\udcff", "conversations": [USER]}),
]
CASES = [*DAMAGED_LINES.items(), *((why, json.dumps(value).encode()) for why, value in MORE_DAMAGED_LINES)]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_cut_compressed_lines(tmp_path, compress):
    questions = [os.urandom(20_000).hex() for _ in range(20)]  # dense, so that half a file holds half of them
    path = tmp_path / "questions.txt"
    data = compress("\n".join(questions).encode())
    path.write_bytes(data[: len(data) // 2])
    stream = ConversationStream(path)
    found = [c.messages[0].content for c in stream]
    assert 0 < len(found) < 20
    assert found == questions[: len(found)]  # the line that was cut is not taken for a short one
    assert stream.ends_early
    assert stream.counts == {"cut off": 1}


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize(("reason", "damaged"), CASES)
def test_damaged_records_are_counted_and_the_rest_is_read(tmp_path, reason, damaged, is_array):
    lines = [json.dumps(RECORDS[0]).encode(), damaged, *(json.dumps(r).encode() for r in RECORDS[1:])]
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + b",\n".join(lines) + b"]" if is_array else b"\n".join(lines) + b"\n")
    conversations, stream = read(path, limits=StreamLimits(max_message_chars=200))
    assert conversations == EXPECTED
    assert stream.counts == {reason: 1}
    assert not stream.ends_early
    assert f"3 conversations read, 1 skipped ({reason}: 1)" in stream.summary()


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("size", [2_000, 3_000_000])
def test_huge_record_is_dropped_without_being_kept(tmp_path, is_array, size):
    texts = [json.dumps(record) for record in (RECORDS[0], sharegpt("x", "y" * size), *RECORDS[1:])]
    path = tmp_path / "data.json"
    path.write_text("[" + ",".join(texts) + "]" if is_array else "\n".join(texts))
    conversations, stream = read(path, limits=StreamLimits(max_record_bytes=1000))
    assert conversations == EXPECTED
    assert stream.counts == {"too long": 1}


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"a":' * 100_000,
        b'{"id":' * 100_000,
        b'[{"id":' * 100_000,
        b'{"id":' + b"9" * 100_000,
        b"[" * 1_000_000,
        b'{"id":"' * 30_000,
        b'{"id":[' * 900 + b'"' + b"x" * 1_000_000,
        b"\0" * 100_000,
        b"{" * 1_000_000,
    ],
    ids=lambda value: value[:8].decode().replace("\0", "0"),
)
def test_hostile_arrays_cost_little(tmp_path, hostile):
    """Deep nesting and endless numbers neither raise nor lose the conversations before them."""
    path = tmp_path / "data.json"
    path.write_bytes(b"[" + json.dumps(RECORDS[0]).encode() + b"," + hostile)
    began = time.process_time()
    conversations, stream = read(path)
    assert time.process_time() - began < 2
    assert conversations == EXPECTED[:1]
    assert stream.ends_early


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_takes_only_what_it_hits(tmp_path_factory, data):
    """Change, drop or insert up to 3 bytes anywhere: every record that was not hit is still read."""
    form = data.draw(st.sampled_from([form for form in FORMATS if form != "indented objects"]))
    original = FORMATS[form].encode()
    ends = _record_ends(original)
    first = original.index(b"{")
    at = data.draw(st.integers(first + 1, len(original)))  # before: what makes it an array at all
    kept_from = at + data.draw(st.integers(0, 3))
    damaged = original[:at] + data.draw(st.binary(max_size=3) | st.text('"{}[]\\,:\n', max_size=3).map(str.encode))
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(damaged + original[kept_from:])
    starts = [original.index(b"{", end) for end in [0, *ends[:-1]]]
    spared = [
        conversation
        for conversation, start, end in zip(EXPECTED, starts, ends, strict=True)
        if at > end or kept_from < start - 1
    ]
    found, _ = read(path)
    assert [conversation for conversation in found if conversation in spared] == spared
    assert len(found) <= len(EXPECTED)


@settings(max_examples=120, deadline=None)
@given(content=st.binary(max_size=400))
def test_arbitrary_bytes_never_raise(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "arbitrary.json"
    path.write_bytes(content)
    stream = ConversationStream(path)
    try:
        assert len(list(stream)) == stream.read > 0
    except UserError:
        assert stream.read == 0


@pytest.mark.parametrize("form", FORMATS)
def test_resume_at_every_position(tmp_path, form):
    """The tail after each conversation, with the same counts at its end, over several files and duplicates."""
    first, second = tmp_path / "first.json", tmp_path / "second.json.gz"
    first.write_text(FORMATS[form])
    second.write_bytes(
        gzip.compress(json.dumps([*RECORDS[1:], sharegpt("d", "New"), {}, sharegpt("e", "Newer")]).encode())
    )
    stream = ConversationStream([first, second])
    everything = list(stream)
    assert [c.id for c in everything] == ["first", "second", "third", "d", "e"]
    for index, conversation in enumerate(everything):
        start = StreamPosition.from_json(json.loads(json.dumps(conversation.position.to_json())))
        resumed = ConversationStream([first, second], start=start)
        assert list(resumed) == everything[index + 1 :]
        assert (resumed.counts, resumed.read) == (stream.counts, stream.read)


def test_a_grown_file_resumes_with_what_was_added(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps(record) + "\n" for record in RECORDS)
    path.write_text(whole[:-30])
    stream = ConversationStream(path)
    before = list(stream)
    assert [c.id for c in before] == ["first", "second"]
    assert stream.ends_early
    path.write_text(whole)
    assert [c.id for c in ConversationStream(path, start=before[-1].position)] == ["third"]


def test_a_file_that_grows_while_read(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", RECORDS[:1])
    stream = iter(ConversationStream(path))
    found = [next(stream).id]
    with path.open("a") as file:
        file.write(json.dumps(RECORDS[1]) + "\n" + json.dumps(RECORDS[2])[:20])
    found += [c.id for c in stream]
    assert found == ["first", "second"]


def test_a_file_that_vanishes_is_counted(tmp_path):
    paths = [write_lines(tmp_path / f"{n}.jsonl", [record]) for n, record in enumerate(RECORDS)]
    stream = ConversationStream(paths)
    paths[1].unlink()
    assert [c.id for c in stream] == ["first", "third"]
    assert stream.counts == {"file vanished": 1}


def test_forgotten_ids_bound_the_memory(tmp_path):
    records = [sharegpt(name, "x") for name in ("a", "a", "b", "c", "a")]
    path = write_lines(tmp_path / "data.jsonl", records)
    assert [c.id for c in ConversationStream(path, limits=StreamLimits(remembered_ids=2))] == [
        "a",
        "b",
        "c",
        "a",
    ]


def test_numbers_and_missing_ids(tmp_path):
    turns = [{"role": "user", "content": "x"}]
    lines = [
        {"id": 7, "messages": turns},
        {"messages": turns},
        {"messages": turns},
        {"id": None, "messages": turns},
    ]
    stream = ConversationStream(write_lines(tmp_path / "data.jsonl", lines))
    names = [c.id for c in stream]
    assert names[0] == "7"
    assert len(names) == 2  # the same messages without an id are the same conversation
    assert stream.counts == {"duplicate id": 2}


def test_user_errors(tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text("")
    with pytest.raises(UserError, match=r"cannot read conversations from .*missing\.json: there is no such file"):
        ConversationStream(tmp_path / "missing.json")
    with pytest.raises(UserError, match="it is a directory"):
        ConversationStream(tmp_path)
    with pytest.raises(UserError, match="no usable conversation in"):
        list(ConversationStream(empty))
    with pytest.raises(UserError, match="one path or more"):
        ConversationStream([])
    with pytest.raises(UserError, match="stdin at most once"):
        ConversationStream(["-", "-"])
    with pytest.raises(UserError, match="in file 3"):
        ConversationStream(empty, start=StreamPosition(3))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"file": 0, "record": 1},
        {"file": 0, "record": True, "turn": 0},
        {"file": -1, "record": 0, "turn": 0},
        {"file": 0, "record": 0, "turn": 0, "x": 1},
    ],
)
def test_damaged_positions_are_refused(value):
    with pytest.raises(UserError, match="a stream position is an object of the numbers file, record, turn"):
        StreamPosition.from_json(value)
