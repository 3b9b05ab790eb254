"""A server's learning as a run on the disk: who owns the directory, snapshots, metrics, and the drafter at the end.

The directory is laid out as a training run's (`learn/run_directory.py`). No text and no token of a request is written
there: snapshots have weights and the optimiser's state, and the windows start afresh.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from dvi_jax.checkpoint import Checkpoint, read_manifest, read_token_ids
from dvi_jax.compiling import tell_when_compiling
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.fast_update import LearnerState, with_trainable
from dvi_jax.learn.new_drafter import kept_or_new_drafter
from dvi_jax.learn.run_directory import Report, RunDirectory
from dvi_jax.learn.run_identity import RunIdentity, by_name, read_identity
from dvi_jax.loading import LoadedModel, enable_compilation_cache, from_checkpoint, trained_parts
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learner import Learner
from dvi_jax.trained_parts import with_drafter_from, write_drafter

KEPT = 2  # snapshots
# Settings that make no other run: a snapshot holds no windows.
MAY_CHANGE = (
    *("share", "save_seconds", "replay_bytes", "replay_capacity"),
    *("window", "positions", "logits_bytes", "fresh_windows", "replayed_windows"),
)


class LearningRun:
    """As a context manager: `out` is this server's, and what was learned there before is live (`resume`).

    `learner` goes into the engine, `model` with it. Leaving writes a snapshot and the drafter (`drafter`, where it
    lies); the engine must be closed by then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: LoadedModel,
        settings: LearnSettings,
        out: str | Path,
        *,
        context: int,
        resume: bool = False,
        report: Report = lambda kind, record: None,
    ):
        """`model` is `checkpoint` loaded; of the checkpoint only the manifest and the vocabulary of drafts are used.

        A run that is resumed keeps the `matrices` of its settings.
        `UserError` if it cannot learn, if there is too little memory, if `out` is in use, or has another run, or a run
        that is not to be resumed.
        """
        self._settings = settings
        # Not its weights, which are on the device; their hash says for which weights the drafter is.
        weights = model.manifest.base_sha256 or hash_base(checkpoint.base)
        self._model = replace(model, manifest=replace(model.manifest, base_sha256=weights))
        self._checkpoint = replace(checkpoint, base={})
        self._directory = RunDirectory(out, keep=KEPT, keep_best=0, resume=resume, report=report)
        self._context = context
        self.drafter: Path | None = None

    def __enter__(self) -> LearningRun:
        with ExitStack() as stack:
            directory = stack.enter_context(self._directory)
            begun = read_identity(directory.path) if directory.resumes else None
            if begun is not None:  # its snapshots have those moments; before there was a choice, Adam's
                self._settings = replace(self._settings, matrices=begun.fixed.get("matrices", "adamw"))
            directory.identify(self._identity())
            self.learner = Learner(self._model, self._settings, self._context, report=directory.log, save=self._save)
            found, _ = directory.restore(self.learner.template)
            if found is not None:
                self.learner.restore(found.state, found.progress)
                directory.report("resume", {"step": found.step})
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self._finish()

    @property
    def model(self) -> LoadedModel:
        """With the drafter that was learned so far."""
        return self._model.with_params(self.learner.params())

    def section(self) -> dict[str, Any]:
        """What `/v1/dvi/status` shows."""
        return asdict(self.learner.status) | {"share": self._settings.share, "out": str(self._directory.path)}

    def _identity(self) -> RunIdentity:
        """What must be the same for a server to go on here: weights and drafter, and how it learns."""
        manifest, settings = self._model.manifest, dict(by_name(asdict(self._settings)))
        fixed = {
            "trainer": "serve",
            "model.weights": manifest.base_sha256,
            "exit_layer": manifest.exit_layer,
            "drafter": manifest.drafter,
            **{f"drafter_options.{name}": value for name, value in manifest.drafter_config.items()},
            **{f"lora.{name}": value for name, value in manifest.lora.items()},
        }
        free = {name: settings.pop(name) for name in MAY_CHANGE} | {"kv": self._model.kv}
        return RunIdentity.of(fixed | settings, free)

    def _save(self, state: LearnerState, progress: dict[str, Any]) -> bool:
        """A snapshot in the background; not while one is being written."""
        if self._directory.snapshots.is_saving:
            return False
        self._directory.log_failed_saves(int(state.step))
        self._directory.save(state, progress)
        return True

    def _finish(self) -> None:
        """The last snapshot, and the drafter by itself, unless nothing was learned."""
        directory = self._directory
        state, progress = self.learner.finish()
        step = int(state.step)
        if step:
            directory.save(state, progress)
            self.drafter, is_there = directory.checkpoint_path(step, lambda path: self._is_drafter(path, step))
            if not is_there:
                self._write_drafter(self.drafter, state, step)
            directory.log("summary", step, {**progress, "drafter": self.drafter.name})
        directory.finish(step)

    def _manifest_values(self, step: int) -> dict[str, Any]:
        begun = self._model.manifest.training_step
        return {"training_step": begun + step, "run_digest": self._directory.identity.digest}

    def _is_drafter(self, path: Path, step: int) -> bool:
        """Whether what lies there is of this run's very update."""
        try:
            manifest = asdict(read_manifest(path))
        except UserError:
            return False
        return all(manifest[name] == value for name, value in self._manifest_values(step).items())

    def _write_drafter(self, path: Path, state: LearnerState, step: int) -> None:
        params = with_trainable(self._model.params, state.served)
        manifest = replace(self._model.manifest, calibration=(), **self._manifest_values(step))  # fitted to others
        write_drafter(path, replace(self._checkpoint, manifest=manifest, **jax.device_get(trained_parts(params))))


def load_to_learn(options: argparse.Namespace) -> tuple[Checkpoint, LoadedModel]:
    """The model that the options of loading name, with an untrained drafter of kind `--drafter` if they ask for one."""
    enable_compilation_cache()
    tell_when_compiling()
    checkpoint = open_checkpoint(options.checkpoint, options.dtype, options.weights)
    if options.drafter_from is not None:
        checkpoint = with_drafter_from(checkpoint, options.drafter_from, any_model=options.any_drafter)
    if options.draft_vocabulary is not None:
        checkpoint = replace(checkpoint, draft_vocabulary=read_token_ids(Path(options.draft_vocabulary)))
    if options.drafter is not None:
        checkpoint = kept_or_new_drafter(checkpoint, options.drafter, {}, options.exit_layer)
    return checkpoint, from_checkpoint(checkpoint, exit_layer=options.exit_layer, kv=options.kv)
