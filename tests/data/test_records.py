"""The format is found in the content, and overlong input is dropped as it comes."""

from __future__ import annotations

import pytest

from dvi_jax.data.records import ARRAY, JSON_LINES, TEXT_LINES, Damaged, RecordReader, detect_format
from dvi_jax.data.sources import ByteSource


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b'[{"id": 1}]', "x.txt", ARRAY),
        (b" \n[\n  {", "x", ARRAY),
        (b"[", "x", ARRAY),
        (b"[]", "x", ARRAY),
        (b'{\n "id": 1\n}', "x", ARRAY),  # objects over several lines are read like the elements of an array
        (b'\xef\xbb\xbf[{"id": 1}]', "x", ARRAY),
        (b'{"id": 1}\n{"id": 2}\n', "x.json", JSON_LINES),
        (b'garbage\n{"id": 2}\n', "x", JSON_LINES),
        (b'{"id": "a line longer than the head', "x", JSON_LINES),
        (b"garbage", "x.jsonl", JSON_LINES),
        (b"garbage", "x.jsonl.gz", JSON_LINES),
        (b"garbage", "x.json", ARRAY),
        (b"[Hello] there\n", "x", TEXT_LINES),
        (b"{name} is a template\n", "x", TEXT_LINES),
        (b"What is 1 + 1?\n", "x.txt", TEXT_LINES),
        (b"", "x", TEXT_LINES),
    ],
)
def test_format_by_content(head, name, expected):
    assert detect_format(head, name) == expected


class Pieces(ByteSource):
    """A source that delivers the given chunks."""

    def __init__(self, pieces: list[bytes], path: str):
        super().__init__(path)
        self._pieces = pieces

    def chunks(self):
        return iter(self._pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("content", ['[{"id": 1, "t": "\u00e9\U0001f600\\"}"}, {"id": 22}, 333, {"id": 4}]',
                                     '{"id": 1, "t": "\u00e9\U0001f600\\"}"}\n{"id": 22}\n333\n{"id": 4}'])  # fmt: skip
def test_chunk_borders_do_not_matter(content, size):
    data = content.encode()
    reader = RecordReader(Pieces([data[i : i + size] for i in range(0, len(data), size)], "x.json"), 1000)
    first, second, third, fourth = reader
    assert (first, second, fourth) == ({"id": 1, "t": '\u00e9\U0001f600"}'}, {"id": 22}, {"id": 4})
    assert third in (333, Damaged("not an object"))
    assert not reader.ends_early


def test_a_line_is_given_out_before_more_arrives():
    """A live pipe is not held up until a buffer is full."""
    arrived = []

    def deliver():
        for piece in (b'{"id": 1}\n', b'{"id": 2}\n'):
            arrived.append(piece)
            yield piece

    source = Pieces([], "x")
    source.chunks = deliver
    assert next(iter(RecordReader(source, 1000))) == {"id": 1}
    assert len(arrived) == 1
