"""metrics.jsonl: one JSON object a line, each with `kind` and `step`; rewound when a run resumes from a snapshot.

A number that is not finite is null there: JSON has no other word for it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError


class MetricsLog:
    """Appends records to `path`, keeping what is there. What a full disk refuses is kept and written later."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()  # of the file's end, and of what waits
        if path.exists() and not path.is_file():  # to open a pipe would wait for who reads it
            raise UserError(f"{path} is not a file: move it away")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def append(self, record: dict[str, Any]) -> None:
        """Hand one record to the operating system, after those it refused before; `flush` tells of a refusal."""
        with self._lock, suppress(OSError):
            self._waiting += _line(record).encode()
            self._write_waiting()

    def flush(self) -> None:
        """Bring everything appended to the disk: a snapshot must not be newer than the metrics before it.

        What was refused is tried again, as there may be room by now: a snapshot fails for what the disk is, not for
        what it was. Raises `OSError` if the disk does not take it. May be called from another thread.
        """
        with self._lock:
            self._write_waiting()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind."""
        return [record for record in read_records(self.path) if record["kind"] == kind]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step` (and lines that a kill cut off); returns the evaluations that stay."""
        kept = [record for record in read_records(self.path) if record["step"] <= step and record["kind"] != "summary"]
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(map(_line, kept))
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(partial, self.path)
            self._open()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        return [record for record in kept if record["kind"] == "eval"]

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        self._length = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def _write_waiting(self) -> None:
        """Write all waiting lines; if only some bytes fit, cut the file back to whole lines."""
        written = self._file.write(self._waiting)
        if written < len(self._waiting):
            self._file.truncate(self._length)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._length += written
        self._waiting = b""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every line that is a record."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a kill, or damaged
            continue
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            records.append(record)
    return records


def has_summary(path: Path) -> bool:
    """Whether these are the metrics of a run that came to its end."""
    return path.is_file() and any(record["kind"] == "summary" for record in read_records(path))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """`value` with null in place of numbers that JSON does not have: not a number, and the infinite ones."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
