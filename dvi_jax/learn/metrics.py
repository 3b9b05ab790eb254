"""metrics.jsonl: one JSON object a line, each with `kind` and `step`; rewound when a run resumes from a snapshot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError


class MetricsLog:
    """Appends records to `path`, keeping what is there."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Bring everything written to the disk: a snapshot must not be newer than the metrics before it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind."""
        return [record for record in self._all() if record["kind"] == kind]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step` (and a line cut off by a kill); returns the evaluations that stay."""
        kept = [record for record in self._all() if record["step"] <= step and record["kind"] != "summary"]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file.close()
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return [record for record in kept if record["kind"] == "eval"]

    def _all(self) -> list[dict[str, Any]]:
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # the last line of a killed run
        return records
