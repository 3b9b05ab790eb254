"""Logs as people have them: what is kept of a conversation, whose ids count, encodings, line ends, binary files."""

from __future__ import annotations

import codecs
import gzip
import json

import pytest

from dvi_jax.data.conversations import ConversationStream, Message
from dvi_jax.errors import UserError

ASKED, ANSWERED = Message("user", "Q"), Message("assistant", "A")
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PART = {"type": "text", "text": "look"}


def read(tmp_path, *records) -> tuple[list[tuple[Message, ...]], ConversationStream]:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    stream = ConversationStream(path)
    return [conversation.messages for conversation in stream], stream


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, (ASKED, ANSWERED)),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, (ASKED,)),
        ({"messages": [{"role": "developer", "content": "S"}, USER]}, (Message("system", "S"), ASKED)),
        ({"system": "S", "messages": [USER]}, (Message("system", "S"), ASKED)),
        ({"system": "", "conversations": [{"from": "human", "value": "Q"}]}, (ASKED,)),
        ({"system_prompt": "other", "messages": [{"role": "system", "content": "S"}, USER]},
         (Message("system", "S"), ASKED)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ASSISTANT]}, (ASKED, ANSWERED)),
        ({"messages": [{"role": "user", "content": ["Q", {"type": "text", "text": "r"}]}]}, (Message("user", "Qr"),)),
        ({"messages": [{"role": "user", "content": {"type": "text", "text": "Q"}}]}, (ASKED,)),
        ({"messages": [{"role": "system", "content": None}, USER, ASSISTANT]}, (ASKED, ANSWERED)),
        ({"messages": [{"role": "system", "content": []}, USER, {"role": "assistant", "content": ""}]}, (ASKED,)),
        ({"system": "", "system_prompt": "S", "messages": [USER]}, (Message("system", "S"), ASKED)),
        ({"system": [{"type": "text", "text": "S"}], "messages": [USER]}, (Message("system", "S"), ASKED)),
        ({"system": 3, "messages": [USER]}, (ASKED,)),
        ({"conversations": [{"from": "prompter", "value": "Q"}, {"from": "model", "value": "A"}]}, (ASKED, ANSWERED)),
    ],
)  # fmt: skip
def test_whole_conversations(tmp_path, record, messages):
    found, stream = read(tmp_path, record)
    assert found == [messages]
    assert dict(stream.counts) == {}
    assert stream.summary() == "1 conversations read"


@pytest.mark.parametrize(
    ("turns", "kept", "reason"),
    [
        ([USER, {"role": "function_call", "content": "{}"}, ASSISTANT], (ASKED,), "turn of function_call"),
        ([USER, ASSISTANT, {"role": "tool", "content": "15"}], (ASKED, ANSWERED), "turn of tool"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, ASSISTANT], (ASKED,), "turn of tool_calls"),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}], (ASKED,), "turn of tool_calls"),
        ([USER, {"role": "assistant", "content": None}], (ASKED,), "missing field"),
        ([USER, {"role": "assistant", "content": ""}, USER, ASSISTANT], (ASKED,), "empty"),
        ([USER, ASSISTANT, {"role": "user", "content": [PART, {"type": "image"}]}, ASSISTANT], (ASKED, ANSWERED),
         "wrong type"),
        ([USER, {"role": "assistant", "content": [PART, {"type": "tool_use", "name": "f"}]}], (ASKED,),
         "turn of tool_use"),
        ([USER, ASSISTANT, {"role": "user", "content": [{"type": "tool_result", "content": "3"}]}], (ASKED, ANSWERED),
         "turn of tool_result"),
        ([USER, ASSISTANT, {"role": "user", "content": 3}], (ASKED, ANSWERED), "wrong type"),
        ([USER, ASSISTANT, {"role": "code_interpreter", "content": "x"}, ASSISTANT], (ASKED, ANSWERED), "wrong role"),
    ],
)  # fmt: skip
def test_conversations_that_end_early(tmp_path, turns, kept, reason):
    found, stream = read(tmp_path, {"messages": turns})
    assert found == [kept]
    assert dict(stream.counts) == {f"cut short at {reason}": 1}
    assert stream.summary() == f"1 conversations read, 1 of them cut short ({reason}: 1)"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "tool", "content": "x"}, USER], "turn of tool"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "wrong type"),
        ([{"role": "system", "content": "only"}], "no user message"),
    ],
)
def test_conversations_without_a_question_are_counted(tmp_path, turns, reason):
    found, stream = read(tmp_path, {"messages": [USER]}, {"messages": turns})
    assert found == [(ASKED,)]
    assert dict(stream.counts) == {reason: 1}
    assert stream.summary() == f"1 conversations read, 1 skipped ({reason}: 1)"


def test_an_id_is_a_name_inside_its_file(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path in paths[:2]:
        records = [{"id": n, "messages": [{"role": "user", "content": f"{path.name} {n}"}]} for n in range(3)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    again = {"id": "elsewhere", "messages": [{"role": "user", "content": "b.jsonl 1"}]}
    paths[2].write_text(json.dumps(again) + "\n" + json.dumps({**again, "messages": [USER]}) + "\n")
    stream = ConversationStream(paths)
    questions = [conversation.messages[0].content for conversation in stream]
    assert questions == [*(f"{name} {n}" for name in ("a.jsonl", "b.jsonl") for n in range(3)), "Q"]
    assert dict(stream.counts) == {"duplicate id": 1}


LINES = "What is two plus two?\nName a colour: caf\u00e9 \U0001f600\n\nSay hi."


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_text_in_every_encoding_and_with_every_line_end(tmp_path, mark, encoding, end):
    path = tmp_path / "lines.txt"
    path.write_bytes(mark + LINES.replace("\n", end).encode(encoding))
    found = [conversation.messages[0].content for conversation in ConversationStream(path)]
    assert found == ["What is two plus two?", "Name a colour: caf\u00e9 \U0001f600", "Say hi."]


@pytest.mark.parametrize("text", [json.dumps([{"messages": [USER]}]), json.dumps({"messages": [USER]}) + "\r\n"])
def test_json_in_utf16(tmp_path, text):
    path = tmp_path / "data"
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    assert [conversation.messages for conversation in ConversationStream(path)] == [(ASKED,)]


def test_half_a_letter_in_utf16_costs_its_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + "one\n\ud83d two\nthree".encode("utf-16-le", "surrogatepass"))
    stream = ConversationStream(path)
    assert [conversation.messages[0].content for conversation in stream] == ["one", "three"]
    assert dict(stream.counts) == {"invalid UTF-8": 1}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PAR1\x15\x04\x15\x8c\x1f\x00\x00" + b"text" * 50 + b"PAR1", "a Parquet file"),
        (gzip.compress(b"PAR1\x15\x00\x00\n" * 9, mtime=0), "a Parquet file"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x00", "a zip archive"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"some words\n\x00\x01\x02 and more\n", "binary"),
        ("no mark".encode("utf-16-le"), "binary"),
    ],
)
def test_files_that_are_no_text_are_refused_before_anything_is_read(tmp_path, content, kind):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.json"
    good.write_text("A question?\n")
    bad.write_bytes(content)
    bad = bad.rename(tmp_path / "bad")
    stream = ConversationStream([good, bad])
    with pytest.raises(UserError, match=f"bad is {kind}"):
        next(iter(stream))
    assert stream.read == 0


@pytest.mark.parametrize("name", ["lines.txt", "log.jsonl"])
def test_a_pointer_to_a_file_is_called_that(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file itself: fetch it"):
        next(iter(ConversationStream(path)))
    path.write_text("version https://git-lfs.github.com/spec/v1 is what?\n")
    if name == "lines.txt":
        assert len(list(ConversationStream(path))) == 1


@pytest.mark.parametrize("text", ["PAR1 is a magic number.", "PK is who?", "BZh\u00e9 means what?", "GGUF files?"])
def test_words_that_begin_like_a_binary_file_are_text(tmp_path, text):
    path = tmp_path / "lines.txt"
    path.write_text(text, encoding="utf-8")
    assert [conversation.messages[0].content for conversation in ConversationStream(path)] == [text]
