"""Bytes as lines of UTF-8: encodings recognised by their mark, other line ends, and files that are not text at all."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator

from dvi_jax.errors import UserError

HEAD_BYTES = 1 << 16
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LONGEST_MARK = 4
_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"7z\xbc\xaf": "a 7z archive",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GGUF": "a GGUF model",
}
_POINTER = b"version https://git-lfs.github.com/spec/"


def utf8_chunks(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same text in UTF-8 without a byte order mark; what cannot be decoded spoils its own line alone."""
    head = b""
    while len(head) < _LONGEST_MARK and (chunk := next(chunks, b"")):
        head += chunk
    mark, name = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "utf-8"))
    chunks = itertools.chain([head.removeprefix(mark)] if head != mark else [], chunks)
    if name == "utf-8":
        yield from chunks
        return
    # Halves of pairs become bytes that are no UTF-8, which their line is then refused for.
    decoder = codecs.getincrementaldecoder(name)("surrogatepass" if name.startswith("utf-16") else "replace")
    for chunk in chunks:
        if data := decoder.decode(chunk).encode("utf-8", "surrogatepass"):
            yield data


def unix_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Line ends of Windows (CR LF) and of old Macs (CR) as LF."""
    is_open = False  # a CR came last, and its LF may follow
    for chunk in chunks:
        if is_open and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        is_open = chunk.endswith(b"\r") or (is_open and not chunk)
        yield chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def refuse_binary(head: bytes, name: str, *, is_text: bool) -> None:
    """Raise `UserError` if a file that begins with `head` is not text, or stands for another one.

    `is_text`: nothing else told its format.
    """
    if head.startswith(_POINTER) and b"\noid " in head:
        raise UserError(f"{name} is a Git LFS pointer, not the file itself: fetch it (git lfs pull)")
    kind = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), "binary" if is_text else None)
    if kind is not None and (b"\0" in head or (kind != "binary" and not _is_utf8(head))):
        raise UserError(f"{name} is {kind}, not text: give JSON, JSON lines or text lines (gzip or zstd is fine)")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end inside a letter
    except UnicodeDecodeError:
        return False
    return True
