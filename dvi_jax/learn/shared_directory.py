"""A run's directory where several processes learn together.

The first process has the directory, and tells the others what they must know of it: which run it is and the snapshot
that it goes on from. So the others need no disk in common with it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from dvi_jax.learn.run_directory import CHECKPOINT, Report, RunDirectory
from dvi_jax.learn.run_identity import RunIdentity
from dvi_jax.learn.snapshot import Snapshot, State
from dvi_jax.processes import told_bytes


def open_directory(
    out: str | Path, *, keep: int, keep_best: int, resume: bool, report: Report, tensorboard: bool = False
) -> RunDirectory:
    """The directory of a run, as this process is to see it; the arguments are those of `RunDirectory`."""
    several = FirstDirectory if jax.process_index() == 0 else OtherDirectory
    kind = RunDirectory if jax.process_count() == 1 else several
    return kind(out, keep=keep, keep_best=keep_best, resume=resume, report=report, tensorboard=tensorboard)


class FirstDirectory(RunDirectory):
    """That of the first process: what it reads, the others hear."""

    def identify(self, identity: RunIdentity) -> None:
        super().identify(identity)
        told_bytes(json.dumps(asdict(self.identity)).encode())

    def restore(self, template: State) -> tuple[Snapshot[State] | None, list[dict[str, Any]]]:
        found, evaluations = super().restore(template)
        _tell_found(found, evaluations)
        return found, evaluations

    def last_good(self, *arguments: Any, **options: Any) -> Snapshot[Any] | None:
        found = super().last_good(*arguments, **options)
        _tell_found(found, [])
        return found


class OtherDirectory(RunDirectory):
    """What another process has in its place: it hears what the first one reads, and writes nothing."""

    def __enter__(self) -> OtherDirectory:
        self.snapshots: Any = SimpleNamespace(waited_seconds=0.0)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def identify(self, identity: RunIdentity) -> None:
        self.identity = RunIdentity(**json.loads(told_bytes(b"")))

    def restore(self, template: State) -> tuple[Snapshot[State] | None, list[dict[str, Any]]]:
        return _hear_found(template)

    def last_good(self, template: State, *arguments: Any, **options: Any) -> Snapshot[State] | None:
        return _hear_found(template)[0]

    def save(self, state: Any, progress: dict[str, Any], *, score: float | None = None, regular: bool = True) -> None:
        pass

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        pass

    def log_failed_saves(self, step: int) -> None:
        pass

    def finish(self, step: int) -> None:
        pass

    def checkpoint_path(self, step: int, is_there: Any) -> tuple[Path, bool]:
        return self.path / CHECKPOINT, True


def _tell_found(found: Snapshot[Any] | None, evaluations: list[dict[str, Any]]) -> None:
    about = (
        {"evaluations": evaluations}
        if found is None
        else {"evaluations": evaluations, "step": found.step, "progress": found.progress}
    )
    told_bytes(json.dumps(about).encode())
    if found is not None:
        told_bytes(b"".join(_numbers(leaf).tobytes() for leaf in jax.tree.leaves(found.state)))


def _hear_found(template: State) -> tuple[Snapshot[State] | None, list[dict[str, Any]]]:
    about = json.loads(told_bytes(b""))
    if "step" not in about:
        return None, about["evaluations"]
    heard, at, leaves = told_bytes(b""), 0, []
    for leaf in jax.tree.leaves(template):
        like = _numbers(leaf)
        numbers = np.frombuffer(heard, like.dtype, like.size, at).reshape(like.shape)
        at += numbers.nbytes
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        leaves.append(jax.random.wrap_key_data(jax.numpy.asarray(numbers)) if is_key else numbers)
    state = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return Snapshot(about["step"], state, about["progress"], []), about["evaluations"]


def _numbers(leaf: jax.Array) -> np.ndarray:
    """An array that lies on every process, or the numbers of a PRNG key."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
