"""TensorBoard events: the numbers of metrics.jsonl once more, as curves to watch while a run goes on.

They are a view. metrics.jsonl is the record, and a disk that takes no events ends no run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError

CURVES = ("train", "eval")  # kinds of record that are drawn


class Events:
    """Appends the records of one run to a file of events in `folder`, as scalars `kind/name` over the update.

    `refusal` is the disk's reason once it has refused something; nothing is written after that. Raises `UserError`
    without the library tensorboardX.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise UserError("tensorboard needs tensorboardX: pip install 'dvi-jax[tensorboard]'") from error
        self._file, self._protocol, self._scalar = event_file_writer, event_pb2, summary.scalar
        self._folder = folder
        self._writer: Any = None
        self.refusal: str | None = None

    def begin(self, step: int) -> None:
        """Open a file whose events take the place of those from update `step` on in files of the run so far."""
        earlier = len(list(self._folder.glob("events.out.tfevents.*")))
        try:
            # The library's writer in the background would wait for ever for a disk that is full. Files are read in the
            # order of their names, which tell seconds apart and no less.
            self._writer = self._file.EventsWriter(str(self._folder / "events"), f".{earlier:03d}")
        except OSError as error:
            raise UserError(f"cannot write events in {self._folder}: {error.strerror}") from error
        session = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._write(step=step, session_log=session)

    def append(self, record: dict[str, Any]) -> None:
        """Add the numbers of a record, if it is of a kind that has curves."""
        if record["kind"] in CURVES:
            for name, value in _scalars(record):
                self._write(step=record["step"], summary=self._scalar(f"{record['kind']}/{name}", value))

    def flush(self) -> None:
        """Bring everything appended to the disk, if it takes it. May be called from another thread."""
        self._unless_refused(lambda: self._writer.flush())

    def close(self) -> None:
        """Flush and close the file, if one was opened."""
        if self._writer is not None:
            self._unless_refused(lambda: self._writer.close())

    def _write(self, **content: Any) -> None:
        event = self._protocol.Event(wall_time=time.time(), **content)
        self._unless_refused(lambda: self._writer.write_event(event))

    def _unless_refused(self, act: Callable[[], object]) -> None:
        if self.refusal is not None:  # a record may have been cut, and readers would not get past it
            return
        try:
            act()
        except OSError as error:
            self.refusal = error.strerror or str(error)


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of the finite numbers of a record; `name/j` for the j-th of a list, from 1."""
    for name, value in record.items():
        if name == "step":
            continue
        parts = enumerate(value, 1) if isinstance(value, list | tuple) else [(0, value)]
        for place, part in parts:
            if isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part):
                yield (f"{name}/{place}" if place else name), float(part)
