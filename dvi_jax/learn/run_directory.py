"""The directory of a run: one owner at a time, its metrics, its snapshots, and where its checkpoint goes.

`LOCK` is held while a run is at work and names its owner, `metrics.jsonl` is what was measured, `snapshots/` what a
resumed run goes on from, `checkpoint/` what a finished one leaves.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from dvi_jax.checkpoint import read_manifest
from dvi_jax.directories import remove_partial
from dvi_jax.errors import UserError
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.snapshot import Snapshot, Snapshots, State
from dvi_jax.learn.stopping import Stopped

Report = Callable[[str, dict[str, Any]], None]  # (kind of record, record)


class RunDirectory:
    """`out`, owned by this run while the context lasts. `report` is called with every record.

    Raises `UserError` if another run is at work there, or one left snapshots and this is not `resume`.
    """

    def __init__(self, out: str | Path, *, keep: int, keep_best: int, resume: bool, report: Report):
        self.path, self.resume, self.report = Path(out), resume, report
        self._keep, self._failed_saves = (keep, keep_best), 0

    def __enter__(self) -> RunDirectory:
        with ExitStack() as stack:
            stack.enter_context(lock(self.path))
            if not self.resume:
                refuse_earlier_run(self.path)
            remove_partial(self.path)
            self.metrics = stack.enter_context(closing(MetricsLog(self.path / "metrics.jsonl")))
            self.snapshots = stack.enter_context(Snapshots((self.path / "snapshots").absolute(), *self._keep))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def restore(self, template: State) -> tuple[Snapshot[State] | None, list[dict[str, Any]]]:
        """The newest whole snapshot if this run resumes one, and the evaluations up to there.

        Metrics after it are dropped: those of a run that was killed before its first snapshot, all.
        """
        found = self.snapshots.newest(template) if self.resume else None
        evaluations = self.metrics.rewind(-1 if found is None else found.step)
        if found is not None:
            self._log_damaged(found, found.step)
        return found, evaluations

    def last_good(
        self, template: State, among: Callable[[int], bool], step: int, *, best: bool = False
    ) -> Snapshot[State] | None:
        """`Snapshots.last_good`, telling of damaged ones at `step`."""
        found = self.snapshots.last_good(template, among, best=best)
        if found is not None:
            self._log_damaged(found, step)
        return found

    def _log_damaged(self, found: Snapshot[State], step: int) -> None:
        """Tell at `step` of the snapshots that could not be read before `found`."""
        for reason in found.damaged:
            self.log("damaged_snapshot", step, {"reason": reason, "snapshot": found.step})

    def save(self, state: State, progress: dict[str, Any], *, score: float | None = None, regular: bool = True) -> None:
        """Save in the background, after the metrics so far."""
        self.snapshots.save(state, progress, score=score, regular=regular, before=self.metrics.flush)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record to the metrics and report it."""
        record = {"kind": kind, "step": step, **values}
        self.metrics.append(record)
        self.report(kind, record)

    def log_failed_saves(self, step: int) -> None:
        """Tell of the saves that failed since the last call; learning goes on without them."""
        self.snapshots.poll()
        failed, self.snapshots.failed = self.snapshots.failed, []
        for save in failed:
            self._failed_saves += 1
            values = {"snapshot": save.step, "reason": save.reason, "count": self._failed_saves}
            self.log("failed_save", step, values)

    def stop(self, number: int, step: int) -> NoReturn:
        """End a run that signal `number` asked to stop, once its last snapshot is written."""
        self.snapshots.wait()
        self.log_failed_saves(step)
        newest = max(self.snapshots.steps(), default=None)
        self.report("stopped", {"step": step, "signal": signal.Signals(number).name, "snapshot": newest})
        raise Stopped(number)

    def finish(self, step: int) -> None:
        """Wait for the last snapshot and bring the metrics to the disk; `UserError` if it does not take them."""
        self.snapshots.wait()
        self.log_failed_saves(step)
        try:
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"{self.metrics.path} is not complete: {error.strerror}") from error

    def checkpoint_path(self, step: int) -> tuple[Path, bool]:
        """Where the checkpoint of update `step` goes, and whether it is there already.

        `checkpoint`, or `checkpoint-STEP` if the run had finished before it was resumed with more to do.
        """
        for path in (self.path / "checkpoint", self.path / f"checkpoint-{step}"):
            if not path.exists():
                return path, False
            if read_manifest(path).training_step == step:
                return path, True
        raise UserError(f"{path} is not of update {step}, as its name says: move it away")


def lock(out: Path) -> TextIO:
    """Own `out` until the returned file is closed, or this process ends in any way.

    `UserError` naming the owner if there is one.
    """
    path = out / "LOCK"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            owner = file.read().strip() or "another run"
        if not isinstance(error, BlockingIOError):
            raise UserError(f"cannot lock {path}: {error.strerror}") from error
        raise UserError(f"{out} is in use by {owner}: wait for it, stop it, or choose another out") from error
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    with suppress(OSError):  # on a full disk the lock holds all the same, without a name
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
    return file


def refuse_earlier_run(out: Path) -> None:
    """Raise `UserError` if a run already left snapshots in `out`."""
    snapshots = out / "snapshots"
    if snapshots.is_dir() and any(not path.name.startswith(".") for path in snapshots.iterdir()):
        raise UserError(f"{out} holds an earlier run: pass --resume to go on with it, or choose another out")
