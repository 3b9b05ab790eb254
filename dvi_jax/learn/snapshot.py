"""Snapshots of a training run: everything needed to go on as if it had never stopped.

One orbax step directory per snapshot: `learner` (arrays: drafter, lora_S, optimiser, replay, baseline, update count,
rng) and `progress` (JSON: stream position, counters). Orbax commits a step atomically and off the training path.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from dvi_jax.learn.fast_update import LearnerState


class Snapshots:
    """The snapshots under `directory`; the newest `keep` are kept. Use as a context manager: leaving waits for saves."""

    def __init__(self, directory: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), create=True, enable_async_checkpointing=True
        )
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, learner: LearnerState, progress: dict[str, Any]) -> None:
        """Save asynchronously under the learner's update count. The arrays are copied before this returns."""
        self._manager.save(
            int(learner.step),
            args=ocp.args.Composite(
                learner=ocp.args.StandardSave(_with_raw_key(learner)), progress=ocp.args.JsonSave(progress)
            ),
        )

    def restore(self, template: LearnerState) -> tuple[LearnerState, dict[str, Any]] | None:
        """The newest snapshot in the structure of `template`, None if there is none yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_raw_key(template))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(learner=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
        learner = restored["learner"]
        return learner.replace(key=jax.random.wrap_key_data(learner.key)), restored["progress"]


def _with_raw_key(learner: LearnerState) -> LearnerState:
    return learner.replace(key=jax.random.key_data(learner.key))
