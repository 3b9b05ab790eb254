"""What every training run does, whatever it learns from: resume, evaluate, save, go back, and end with a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from dvi_jax.checkpoint import Checkpoint, Manifest, load_tree, read_manifest, rewrite_checkpoint
from dvi_jax.config import RollbackConfig
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_tree
from dvi_jax.learn.rollback import Watch, failing_updates, go_on_from, non_finite_updates
from dvi_jax.learn.run_directory import RunDirectory
from dvi_jax.learn.run_identity import RunIdentity
from dvi_jax.learn.snapshot import State
from dvi_jax.learn.stopping import Stopped, StopSignals
from dvi_jax.loading import LoadedModel, TrainedParts, stored_parts
from dvi_jax.mesh import copied, to_host
from dvi_jax.model.speculative_llama import Params

Measured = TypeVar("Measured")  # what an evaluation comes to


class Run(ABC, Generic[State, Measured]):
    """The moving parts of one run: `state` is what updates move, `model` what decodes and is evaluated.

    A subclass says how to start, learn and evaluate, and what else a snapshot keeps.
    """

    def __init__(self, checkpoint: Checkpoint, model: LoadedModel, directory: RunDirectory, rollback: RollbackConfig):
        self.checkpoint, self.model, self.directory, self.rollback = checkpoint, model, directory, rollback
        # On the host, for a rollback before the first snapshot.
        self.initial = to_host({name: getattr(model.params, name) for name in ("drafter", "lora_s", "lora_d")})
        self.state: State = self._on_devices(self.initial_state(model.params))
        self.watch = Watch()
        self.before: Measured | None = None  # at the beginning
        self.after: Measured | None = None  # the newest
        self.evaluated = -1  # update of the newest evaluation

    @abstractmethod
    def initial_state(self, params: Params) -> State:
        """The state at update 0 of a model with these arrays."""

    @abstractmethod
    def identity(self) -> RunIdentity:
        """What this run is."""

    @abstractmethod
    def work(self, signals: StopSignals) -> None:
        """Update until there is nothing more to learn, or a signal was received."""

    @abstractmethod
    def measure(self) -> tuple[Measured, dict[str, Any]]:
        """Evaluate `model` on what is held out: the result, and its metrics record."""

    @abstractmethod
    def measured(self, record: dict[str, Any]) -> Measured:
        """The result of an earlier evaluation, from its record."""

    @abstractmethod
    def progress_record(self) -> dict[str, Any]:
        """What a snapshot keeps beside the arrays (JSON), with the watch as `watch`."""

    @abstractmethod
    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Take back what `progress_record` gave."""

    @abstractmethod
    def learned(self) -> dict[str, Any]:
        """The parts of `Params` that the state moves."""

    @abstractmethod
    def drafting(self) -> tuple[str, int]:
        """The plan by which the drafter drafts while it learns ("": as suits the device), and the drafts of a round."""

    def verifier(self) -> str:
        """The name of the verifier that output is lossless relative to."""
        return self.checkpoint.manifest.verifier

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def restore(self) -> None:
        """Go back to the newest whole snapshot if the run resumes one: arrays, counters, metrics.

        A run killed before its first snapshot starts again from the beginning. `UserError` if this is another run than
        the one that was begun there (`run_identity.py`).
        """
        self.directory.identify(self.identity())
        found, evaluations = self.directory.restore(self.state)
        if found is None:
            return
        self.state, self.watch = self._on_devices(found.state), Watch(**found.progress["watch"])
        self.restore_progress(found.progress)
        self.take_over()
        if evaluations:
            self.before, self.after = self.measured(evaluations[0]), self.measured(evaluations[-1])
            self.evaluated = evaluations[-1]["step"]
        self.directory.report("resume", {"step": found.step})

    def learn(self, signals: StopSignals) -> None:
        """Work until it is done or a signal asks to stop (`Stopped`); either way the last state is saved."""
        with signals.held():
            if self.before is None:
                self.before = self.evaluate()
            self.work(signals)
            self.save(regular=False)
        if signals.received:
            raise Stopped(signals.received)

    def evaluate(self) -> Measured:
        """Evaluate the drafter as it now is, and log it."""
        result, values = self.measure()
        self.evaluated = self.step
        self.log("eval", values)
        return result

    def save(self, *, score: float | None = None, regular: bool = True) -> bool:
        """Save in the background; a regular snapshot only of a state that updates have not begun to fail on.

        A slow update that was skipped does not count: it moved nothing, and the next one may be long in coming.
        """
        if regular and failing_updates(self.state):
            return False
        self.directory.save(self.state, self.progress_record(), score=score, regular=regular)
        return True

    def write_checkpoint(self) -> Path:
        """Evaluate, unless the last update was, and write the checkpoint with the trained drafter: where it is."""
        if self.evaluated != self.step:
            self.after = self.evaluate()
        elif self.after is None:  # there was nothing to learn
            self.after = self.before
        parts = stored_parts(self.model)  # by all processes, which may have parts of them
        path, exists = self.directory.checkpoint_path(self.step, partial(self._is_checkpoint, parts))
        if not exists:
            rewrite_checkpoint(self.checkpoint, path, share_base=True, manifest=self.manifest(), **parts)
        self.directory.finish(self.step)
        return path

    def manifest(self) -> Manifest:
        """That of a checkpoint of the present state."""
        plan, draft_steps = self.drafting()
        return replace(
            self.model.manifest,
            training_step=self.step,
            verifier=self.verifier(),
            run_digest=self.directory.identity.digest,
            calibration=(),  # it was fitted to other weights
            plan=plan,
            draft_steps=draft_steps,
        )

    def _is_checkpoint(self, parts: TrainedParts, path: Path) -> bool:
        """Whether this is a checkpoint of the present state, by its manifest and by every bit of what was learned."""
        try:
            manifest = read_manifest(path)
            if (manifest.training_step, manifest.run_digest) != (self.step, self.directory.identity.digest):
                return False
            trees = {name: load_tree(path / name) for name in ("drafter", "lora") if (path / name).exists()}
        except UserError:  # damaged, or something else
            return False
        learned = {name: tree for name, tree in parts.items() if tree}
        return hash_tree(trees) == hash_tree(learned)

    def take_over(self) -> None:
        """Decode and evaluate with what was learned."""
        self.model = self.model.with_params(self.model.params._replace(**self.learned()))

    def has_non_finite_updates(self) -> bool:
        """Whether too many updates in a row were non-finite; then the run has gone back (`rollback.py`)."""
        skipped = non_finite_updates(self.state)
        if not self.rollback.after or skipped < self.rollback.after:
            return False
        self.roll_back(*self.last_good(), {"reason": f"{skipped} non-finite updates in a row"})
        return True

    def last_good(self, *, best: bool = False) -> tuple[State, int | None]:
        """The state of the newest (or best) snapshot that is good and its update; the start if there is none."""
        found = self.directory.last_good(self.state, self.watch.is_good, self.step, best=best)
        if found is None:
            return self._on_devices(self.initial_state(self.model.params._replace(**self.initial))), None
        return self._on_devices(found.state), found.step

    def _on_devices(self, state: State) -> State:
        """What updates move, on all devices of the model."""
        return copied(self.model.definition.mesh, state)

    def roll_back(self, good: State, step: int | None, values: dict[str, Any]) -> None:
        """Go on from `good`, the state of the snapshot `step` (None: the start)."""
        self.watch.roll_back(self.step, step, self.rollback)
        self.state = go_on_from(good, self.state)
        self.take_over()
        self.log("rollback", {**values, "snapshot": step, "rollbacks": self.watch.rollbacks})

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """Append a record of the present update to the metrics."""
        self.directory.log(kind, self.step, values)
