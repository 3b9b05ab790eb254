"""Reading small files of a model directory: bounded, and with errors that name the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from dvi_jax.errors import UserError

FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)  # so it lies in the directory itself
MAX_JSON_BYTES = 16 << 20
_LFS_POINTER, _LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
_HASH_BLOCK = 1 << 20


def open_file(path: Path) -> BufferedReader:
    """`path` open for reading; missing, unreadable, no regular file or a mere pointer to one is a `UserError`.

    Links are followed (the Hugging Face cache is made of them), but a pipe would block and a device never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot read {path}: it is not a regular file")
        file = path.open("rb")
        if path.stat().st_size <= _LONGEST_POINTER:
            begin = file.read(len(_LFS_POINTER))
            file.seek(0)
            if begin == _LFS_POINTER:
                file.close()
                raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it (git lfs pull)")
        return file
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
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r:.100}")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
