"""Reading small files of a model directory: bounded, and with errors that name the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dvi_jax.errors import UserError

MAX_JSON_BYTES = 16 << 20
_HASH_BLOCK = 1 << 20


def open_file(path: Path) -> BinaryIO:
    """`path` open for reading; missing, unreadable or no regular file is a `UserError`.

    Links are followed (the Hugging Face cache is made of them), but a pipe would block and a device never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot read {path}: it is not a regular file")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The file's bytes; missing, unreadable or longer than `max_bytes` is a `UserError`."""
    try:
        with open_file(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise UserError(f"{path} is longer than {max_bytes >> 20} MiB, which no such file should be")
    return data


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """`read_bytes` as UTF-8 text."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def parse_json_object(text: str, where: object) -> dict[str, Any]:
    """`text` as a JSON object without duplicate keys, NaN or Infinity; `where` names the source in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`parse_json_object` of a file."""
    return parse_json_object(read_text(path, max_bytes), path)


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the lines `<sha256>  <name>` of several in the order of their names."""
    digests = [(path.name, _file_sha256(path)) for path in sorted(files)]
    if len(digests) == 1:
        return digests[0][1]
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests)
    return hashlib.sha256(listing.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {duplicate!r:.100}")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
