"""The directory of a run: one owner at a time, its metrics, its snapshots, and where its checkpoint goes.

`LOCK` is held while a run is at work and names its owner, `run.json` says what the run is (`run_identity.py`),
`metrics.jsonl` is what was measured, `snapshots/` what a resumed run goes on from, `checkpoint/` what a finished one
leaves.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dvi_jax.checkpoint import MANIFEST
from dvi_jax.directories import remove_partial
from dvi_jax.errors import UserError
from dvi_jax.learn.metrics import MetricsLog, has_summary
from dvi_jax.learn.run_identity import RUN, RunIdentity, read_identity
from dvi_jax.learn.snapshot import Snapshot, Snapshots, State
from dvi_jax.learn.stopping import Stopped
from dvi_jax.learn.tensorboard import Events

CHECKPOINT, SNAPSHOTS, METRICS, PICTURE, LOCK = "checkpoint", "snapshots", "metrics.jsonl", "curve.png", "LOCK"
Report = Callable[[str, dict[str, Any]], None]  # (kind of record, record)


class RunDirectory:
    """`out`, owned by this run while the context lasts. `report` is called with every record.

    `tensorboard` writes events beside the metrics (`tensorboard.py`). Raises `UserError` if another run is at work
    there, or one left snapshots and this is not `resume`.
    """

    def __init__(
        self, out: str | Path, *, keep: int, keep_best: int, resume: bool, report: Report, tensorboard: bool = False
    ):
        self.path, self.resume, self.report = Path(out), resume, report
        self._events = Events(self.path) if tensorboard else None
        self._keep, self._failed_saves = (keep, keep_best), 0
        self.step = 0  # update of the newest record
        self._changes: list[dict[str, Any]] = []  # of settings, since the run that is resumed

    def __enter__(self) -> RunDirectory:
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with ExitStack() as stack:
            stack.enter_context(lock(self.path))
            stack.push(lambda kind, error, trace: self._forget(new) if error and new else None)
            (check_resumable if self.resume else refuse_earlier_run)(self.path)
            remove_partial(self.path, CHECKPOINT)
            self.metrics = stack.enter_context(closing(MetricsLog(self.path / METRICS)))
            if self._events is not None:
                stack.enter_context(closing(self._events))
            self.snapshots = stack.enter_context(Snapshots((self.path / SNAPSHOTS).absolute(), *self._keep))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self._tell_of_stop(error.number)
        self._stack.__exit__(kind, error, trace)

    def _forget(self, new: list[Path]) -> None:
        """Remove the directories that this run made, innermost first, if it ended before there was anything to keep."""
        if (self.path / RUN).exists():
            return
        with suppress(OSError):  # somebody put something there
            for name in (METRICS, LOCK):
                (self.path / name).unlink(missing_ok=True)
            for path in (self.path / SNAPSHOTS, *new):
                if path.exists():
                    path.rmdir()

    def identify(self, identity: RunIdentity) -> None:
        """Say what the run is, before `restore`; `UserError` if the one that it resumes was another.

        A run of an earlier release, which recorded nothing, is taken to be what it is resumed as.
        """
        begun = read_identity(self.path) if self.resumes else None
        if begun is not None:
            identity, self._changes = identity.resuming(begun, self.path)
        self.identity, self.snapshots.run_digest = identity, identity.digest

    @property
    def resumes(self) -> bool:
        """Whether there is anything to go on from; a run killed before its first snapshot starts again."""
        return self.resume and bool(self.snapshots.steps())

    def restore(self, template: State) -> tuple[Snapshot[State] | None, list[dict[str, Any]]]:
        """The newest whole snapshot if this run resumes one, and the evaluations up to there.

        Metrics after it are dropped: those of a run that was killed before its first snapshot, all.
        """
        found = self.snapshots.newest(template) if self.resume else None
        step = -1 if found is None else found.step
        evaluations = self.metrics.rewind(step)
        if self._events is not None:
            self._events.begin(step + 1)
        try:
            self.identity.write(self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path / RUN}: {error.strerror}") from error
        if found is not None:
            self._log_damaged(found, found.step)
            for change in self._changes:
                self.log("changed_setting", found.step, change)
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
        self.snapshots.save(state, progress, score=score, regular=regular, before=self._flush)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a record to the metrics and report it."""
        record, self.step = {"kind": kind, "step": step, **values}, step
        self.metrics.append(record)
        self.report(kind, record)
        if self._events is not None:
            self._events.append(record)
            if self._events.refusal is not None:
                refusal, self._events = self._events.refusal, None
                self.log("no_events", step, {"reason": refusal})

    def _flush(self) -> None:
        """Bring what was logged to the disk; `OSError` if it does not take the metrics."""
        self.metrics.flush()
        if events := self._events:
            events.flush()

    def log_failed_saves(self, step: int) -> None:
        """Tell of the saves that failed since the last call; learning goes on without them."""
        self.snapshots.poll()
        failed, self.snapshots.failed = self.snapshots.failed, []
        for save in failed:
            self._failed_saves += 1
            values = {"snapshot": save.step, "reason": save.reason, "count": self._failed_saves}
            self.log("failed_save", step, values)

    def _tell_of_stop(self, number: int) -> None:
        """Report what a run that signal `number` ends can go on from, once its last snapshot is written."""
        self.snapshots.wait()
        newest = max(self.snapshots.steps(), default=None)
        step = self.step if newest is None else max(self.step, newest)
        self.log_failed_saves(step)
        self.report("stopped", {"step": step, "signal": signal.Signals(number).name, "snapshot": newest})

    def finish(self, step: int) -> None:
        """Wait for the last snapshot and bring the metrics to the disk; `UserError` if it does not take them."""
        self.snapshots.wait()
        self.log_failed_saves(step)
        try:
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"{self.metrics.path} is not complete: {error.strerror}") from error

    def checkpoint_path(self, step: int, is_there: Callable[[Path], bool]) -> tuple[Path, bool]:
        """Where the checkpoint of update `step` goes, and whether what is there already `is_there`, this very one.

        `checkpoint`; `checkpoint-STEP` if that is taken, as by a run that had finished before it was resumed with more
        to do; or else `checkpoint-STEP-2` and so on. Nothing is overwritten, whatever it is.
        """
        further = (f"{CHECKPOINT}-{step}-{number}" for number in itertools.count(2))
        for name in itertools.chain([CHECKPOINT, f"{CHECKPOINT}-{step}"], further):
            path = self.path / name
            if not os.path.lexists(path):
                return path, False
            if is_there(path):
                return path, True
        raise AssertionError("there are endless names")


def lock(out: Path) -> TextIO:
    """Own `out` until the returned file is closed, or this process ends in any way.

    `UserError` naming the owner if there is one.
    """
    path = out / LOCK
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
    """Raise `UserError` if a run already left snapshots or results in `out`.

    The metrics of one that was killed before its first snapshot are no result.
    """
    found = [*_snapshots(out), *_checkpoints(out), *out.glob(PICTURE)]
    if found or has_summary(out / METRICS):
        name = found[0].relative_to(out) if found else METRICS
        raise UserError(f"{out} holds an earlier run ({name}): pass --resume to go on with it, or choose another out")


def check_resumable(out: Path) -> None:
    """Raise `UserError` if `out` has results and no snapshot to go on from, or what is no checkpoint in its place."""
    for path in _checkpoints(out):
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} is in the way of the run's checkpoint and is none: move it away")
        if not _snapshots(out):
            raise UserError(f"{path} is the result of a run whose snapshots are gone: choose another out")


def _snapshots(out: Path) -> list[Path]:
    directory = out / SNAPSHOTS
    return [path for path in directory.iterdir() if not path.name.startswith(".")] if directory.is_dir() else []


def _checkpoints(out: Path) -> list[Path]:
    """Everything that has, or is in the way of, a checkpoint's name: links that lead nowhere, too."""
    return sorted(path for path in out.iterdir() if path.name.startswith(CHECKPOINT))
