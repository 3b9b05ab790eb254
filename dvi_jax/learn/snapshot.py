"""Snapshots of a training run: everything needed to go on as if it had never stopped.

One directory each, named by its update, and readable with numpy alone:

    arrays.npz       the learner's arrays by path: drafter, lora_S, optimiser, replay, baseline, update count, rng
    progress.json    stream position, counters, held-out accept rate
    CHECKSUMS.json   SHA-256 of the two

A thread of its own writes it under another name, brings it to the disk and renames it, so it is there whole or not at
all; what is damaged later is found by its checksums.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from dvi_jax.archives import DAMAGED_NPZ, Header, read_npz
from dvi_jax.directories import PARTIAL, DamageError, hash_files, partial_directory, remove_partial, verify_files
from dvi_jax.errors import UserError, one_line
from dvi_jax.learn.distill import DistillState
from dvi_jax.learn.fast_update import LearnerState
from dvi_jax.text_files import read_json

State = TypeVar("State", LearnerState, DistillState)
Found = TypeVar("Found")

# Arrays that earlier releases kept under another name.
FORMER_NAMES = {"replay/windows/verifier_hidden": "replay/windows/features/final"}
ARRAYS, PROGRESS, CHECKSUMS = "arrays.npz", "progress.json", "CHECKSUMS.json"


class NotFiniteError(Exception):
    """A state has numbers that are not finite: nobody could go on from it."""


# What ends up in `Snapshots.failed`: the disk, or memory of the host or the device, does not suffice, or the above.
SAVE_FAULTS = (OSError, MemoryError, jax.errors.JaxRuntimeError, NotFiniteError)


class AllDamagedError(UserError):
    """There are snapshots, and none of them is whole."""


@dataclass(frozen=True)
class Snapshot(Generic[State]):
    """A snapshot that was read. `damaged` says what is wrong with those that were to be read before it."""

    step: int
    state: State
    progress: dict[str, Any]
    damaged: list[str]


@dataclass(frozen=True)
class FailedSave:
    """A snapshot that could not be written, and why."""

    step: int
    reason: str


class Snapshots:
    """The snapshots of one run, under `directory`. Use as a context manager: leaving waits for the save that runs.

    Kept are the newest `keep`, the `keep_best` with the highest score, and an irregular one while it is the newest.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int):
        self.directory, self.keep, self.keep_best = directory, keep, keep_best
        self.run_digest = ""  # of the run that these are of (`run_identity.py`); "": not known
        self.failed: list[FailedSave] = []  # since the caller last emptied it
        self.waited_seconds = 0.0  # that learning stood still for saves
        self.written_seconds = 0.0  # that the thread was at work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._running: Future[None] | None = None
        self._running_step = -1

    def __enter__(self) -> Snapshots:
        remove_partial(self.directory)
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._thread.shutdown()

    def save(
        self,
        state: State,
        progress: dict[str, Any],
        *,
        score: float | None = None,
        regular: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Save in the background under `state.step`; waits for the save before, if it still runs.

        `before` is called in the thread and must succeed first. `SAVE_FAULTS` of either end up in `failed`. A snapshot
        that is not `regular`, taken because the run stops, does not count among those to keep or to go back to.
        """
        began = time.perf_counter()
        self.wait()
        step = int(state.step)
        if step not in self.steps():
            document = {"progress": progress, "score": score, "regular": regular, "run": self.run_digest}
            self._running_step = step
            try:
                # A copy of our own: the next update donates these arrays while the save may still be reading them.
                arrays = jax.tree.map(jnp.copy, _named(state))
                self._running = self._thread.submit(self._write, step, arrays, document, before)
            except SAVE_FAULTS as error:
                self.failed.append(FailedSave(step, _reason(error)))
        self.waited_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Return once no save runs."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.result()
        except SAVE_FAULTS as error:
            self.failed.append(FailedSave(self._running_step, _reason(error)))

    def poll(self) -> None:
        """Notice a save that has ended, without waiting for one that has not."""
        if self._running is not None and self._running.done():
            self.wait()

    @property
    def is_saving(self) -> bool:
        """Whether a save runs, for which the next one would wait."""
        return self._running is not None and not self._running.done()

    def steps(self, *, regular: bool = False) -> list[int]:
        """Updates there is a snapshot of, oldest first, whole or not; `regular` leaves out the irregular ones."""
        if not self.directory.is_dir():
            return []
        steps = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())
        return [step for step in steps if not regular or self._document(step).get("regular", True)]

    def newest(self, template: State) -> Snapshot[State] | None:
        """The newest whole snapshot in the structure of `template`; None if there is none yet.

        Damaged ones that are newer are set aside as `STEP.damaged`. If all are, `UserError`, and nothing is touched.
        """
        self.wait()
        return self._first_whole(template, self.steps()[::-1])

    def last_good(self, template: State, among: Callable[[int], bool], *, best: bool = False) -> Snapshot[State] | None:
        """The newest whole regular snapshot of the steps `among` says; `best`: of the highest score first.

        None if there is none.
        """
        self.wait()
        steps = [step for step in self.steps(regular=True) if among(step)][::-1]
        if best:
            steps.sort(key=self._rank, reverse=True)
        try:
            return self._first_whole(template, steps)
        except AllDamagedError:
            return None

    def _first_whole(self, template: State, steps: list[int]) -> Snapshot[State] | None:
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                state, progress = self._read(step, template)
            except DamageError as error:
                damaged[step] = str(error)
                continue
            for other in damaged:
                os.replace(self.directory / str(other), _unused(self.directory / f"{other}.damaged"))
            return Snapshot(step, state, progress, list(damaged.values()))
        if damaged:
            raise AllDamagedError(
                f"no snapshot under {self.directory} is whole ({'; '.join(damaged.values())}); nothing was deleted:"
                " put one back from a backup, or choose another out"
            )
        return None

    def _read(self, step: int, template: State) -> tuple[State, dict[str, Any]]:
        """Snapshot `step`: `DamageError` if it is not as it was written, `UserError` if it does not fit `template`."""
        path = self.directory / str(step)
        checksums = _read_json(path / CHECKSUMS)
        if set(checksums) != {ARRAYS, PROGRESS}:
            raise DamageError(f"{path / CHECKSUMS} is damaged: it must name {ARRAYS} and {PROGRESS}")
        verify_files(path, checksums)
        document = _read_json(path / PROGRESS)
        if (document.get("run") or self.run_digest) != self.run_digest:  # earlier releases name none
            raise UserError(f"{path} is a snapshot of another run than the one in this directory: move it away")
        arrays = read_arrays(path / ARRAYS, expect=lambda headers: _check_fit(headers, template, str(path)))
        return _from_named(arrays, template), document["progress"]

    def _write(
        self, step: int, arrays: dict[str, jax.Array], document: dict[str, Any], before: Callable[[], None]
    ) -> None:
        """The thread's work."""
        began = time.perf_counter()
        before()
        with partial_directory(self.directory / str(step)) as partial:
            write_arrays(partial / ARRAYS, _finite(jax.device_get(arrays)))
            _write_json(partial / PROGRESS, document)
            _write_json(partial / CHECKSUMS, hash_files(partial))
        self._prune()
        self.written_seconds += time.perf_counter() - began

    def _prune(self) -> None:
        """Remove what need not be kept, out of sight first: a kill leaves no half of a snapshot under its name."""
        steps, regular = self.steps(), self.steps(regular=True)
        scored = [step for step in regular if self._document(step).get("score") is not None]
        best = sorted(scored, key=self._rank)[len(scored) - self.keep_best :] if self.keep_best else []
        for step in set(steps) - {steps[-1], *regular[-self.keep :], *best}:
            hidden = self.directory / f".{step}{PARTIAL}"
            os.replace(self.directory / str(step), hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _rank(self, step: int) -> tuple[float, int]:
        """Snapshots with a higher score are better, then newer ones."""
        score = self._document(step).get("score")
        return (-1.0 if score is None else score, step)

    def _document(self, step: int) -> dict[str, Any]:
        """What progress.json says, {} if it cannot be read."""
        try:
            return _read_json(self.directory / str(step) / PROGRESS)
        except DamageError:
            return {}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An uncompressed .npz, on the disk when this returns."""
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any of them for its own `allow_pickle`
        file.flush()
        os.fsync(file.fileno())


def read_arrays(
    path: Path, expect: Callable[[dict[str, Header]], None] = lambda headers: None
) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote; numpy has no name for bfloat16 and gives its bytes. `expect` as in `read_npz`."""
    try:
        return read_npz(path, expect=expect)
    except DAMAGED_NPZ as error:
        raise DamageError(f"{path} cannot be read: {error}") from error


def _named(state: State) -> dict[str, jax.Array]:
    """The arrays of a state by path; typed PRNG keys as plain integers."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _check_fit(headers: dict[str, Header], template: State, where: str) -> None:
    """Raise `UserError` naming the first array that is missing, unknown or of another kind than in `template`."""
    wanted = _named(template)
    headers = _as_now(headers, wanted)
    unknown = sorted(headers.keys() - wanted.keys())
    if unknown:
        raise UserError(f"{where} does not fit these settings: it has {unknown[0]}, which they do not use")
    for name, like in wanted.items():
        if name not in headers:
            raise UserError(f"{where} does not fit these settings: it has no {name}")
        shape, dtype = headers[name]
        if shape != like.shape or (dtype != like.dtype and not _is_raw(dtype, like.dtype)):
            expected = f"{like.dtype} {like.shape}"
            raise UserError(f"{where} does not fit these settings: {name} is {dtype} {shape}, they ask for {expected}")


def _is_raw(dtype: np.dtype, like: np.dtype) -> bool:
    """Whether numpy has only the bytes of such a type."""
    return dtype.kind == "V" and dtype.itemsize == like.itemsize


def _as_now(found: dict[str, Found], wanted: Iterable[str]) -> dict[str, Found]:
    """By this release's names. An average that an earlier one did not keep begins as the weights that it is of."""
    found = {FORMER_NAMES.get(name, name): each for name, each in found.items()}
    absent = {name: name.replace("average/", "trainable/", 1) for name in wanted if name not in found}
    return found | {name: found[weights] for name, weights in absent.items() if weights in found}


def _from_named(arrays: dict[str, np.ndarray], template: State) -> State:
    """Arrays that fit `template`, in its structure."""
    wanted = _named(template)
    arrays = _as_now(arrays, wanted)

    def find(path: KeyPath[Any], old: jax.Array) -> jax.Array:
        name = _name(path)
        array, dtype = arrays[name], wanted[name].dtype
        # Not jnp.array, which compiles a copy for every shape: nobody else holds what was read.
        placed = jax.device_put(array.view(dtype) if _is_raw(array.dtype, dtype) else array)
        return jax.random.wrap_key_data(placed) if _is_key(old) else placed

    return jax.tree.map_with_path(find, template)


def _name(path: KeyPath[Any]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _finite(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`arrays`; `NotFiniteError` naming the first with a number that is not finite."""
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise NotFiniteError(f"{name} has numbers that are not finite")
    return arrays


def _reason(error: BaseException) -> str:
    """In one line why a save failed."""
    text = getattr(error, "strerror", None) or str(error) or "out of memory"
    return one_line(text)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except UserError as error:
        raise DamageError(f"{path} is missing or damaged") from error
    if not isinstance(document, dict):
        raise DamageError(f"{path} is damaged: it must hold an object")
    return document


def _unused(path: Path) -> Path:
    """`path`, or one beside it if that exists."""
    count = 1
    while path.exists():
        count, path = count + 1, path.with_name(f"{path.stem}.damaged{count}")
    return path
