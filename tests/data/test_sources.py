"""Bytes come out as they went in, from every packing; damage is named and what came before it is kept."""

from __future__ import annotations

import gzip
import os
import resource

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi_jax.data.sources import ByteSource

COMPRESS = {"gzip": gzip.compress, "zstd": zstandard.compress}


def read(path) -> tuple[bytes, str | None]:
    source = ByteSource(str(path))
    return b"".join(source.chunks()), source.damage


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.binary(min_size=1, max_size=200), max_size=4), packing=st.sampled_from(sorted(COMPRESS)))
def test_any_number_of_frames(tmp_path_factory, parts, packing):
    path = tmp_path_factory.getbasetemp() / "frames"
    path.write_bytes(b"".join(COMPRESS[packing](part) for part in parts))
    assert read(path) == (b"".join(parts), None)


@pytest.mark.parametrize("packing", COMPRESS)
def test_large_file(tmp_path, packing):
    content = os.urandom(300_000).hex().encode() * 5
    path = tmp_path / "large"
    path.write_bytes(COMPRESS[packing](content))
    assert read(path) == (content, None)


@pytest.mark.parametrize("packing", COMPRESS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_file(tmp_path, packing, share):
    content = os.urandom(500_000).hex().encode()  # so dense that what can be read is in proportion
    data = COMPRESS[packing](content)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(share * len(data))])
    found, damage = read(path)
    assert damage == "cut off"
    assert content.startswith(found)
    # A zstd block holds up to 128 KiB and is only readable as a whole.
    assert len(found) > share * len(content) - 300_000


@pytest.mark.parametrize("packing", COMPRESS)
def test_damaged_file(tmp_path, packing):
    content = os.urandom(500_000).hex().encode()
    data = bytearray(COMPRESS[packing](content))
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    found, damage = read(path)
    assert damage in ("damaged compressed data", "cut off")
    assert found[: len(content) // 4] == content[: len(content) // 4]


def test_garbage_behind_a_whole_file(tmp_path):
    path = tmp_path / "tail"
    path.write_bytes(gzip.compress(b"content") + b"garbage")
    assert read(path) == (b"content", "damaged compressed data")


def test_a_frame_that_asks_for_terabytes_of_window(tmp_path):
    path = tmp_path / "window"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\x00\xff" + b"\x01\x00\x00")  # header: 3.75 TiB; an empty last block
    assert read(path) == (b"", "damaged compressed data")


def test_vanished_file(tmp_path):
    assert read(tmp_path / "missing") == (b"", "file vanished")


def test_unreadable_file(tmp_path):
    assert read(tmp_path) == (b"", "read error")  # a directory


@pytest.mark.parametrize("packing", COMPRESS)
def test_a_bomb_comes_out_in_pieces(tmp_path, packing):
    """A file that unpacks to 512 MiB is never in memory as a whole."""
    frame = COMPRESS[packing](bytes(64 << 20))
    path = tmp_path / "bomb"
    path.write_bytes(frame * 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = total = 0
    for chunk in ByteSource(str(path)).chunks():
        largest, total = max(largest, len(chunk)), total + len(chunk)
    assert total == 512 << 20
    assert largest <= 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
