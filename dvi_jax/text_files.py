"""Text and JSON files of a directory that may be anybody's: regular, of bounded size, and told by name where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError
from dvi_jax.settings import MOST_MESSAGE

MOST_TEXT = 32 * 2**20  # bytes of such a file


def read_json(path: Path) -> Any:
    """Parse a JSON file; missing, malformed or too large raises `UserError` naming it."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # malformed JSON or nested too deep
        raise UserError(f"{path} is not valid JSON: {str(error)[:MOST_MESSAGE]}") from error


def read_text(path: Path) -> str:
    """A regular file (anything else might block for ever) of UTF-8 text of at most `MOST_TEXT` bytes."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise UserError(f"{path} is larger than the {MOST_TEXT >> 20} MiB that it may have")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
