"""Snapshots of a training run: everything needed to go on as if it had never stopped.

One orbax step directory per snapshot: `learner` (arrays: drafter, lora_S, optimiser, replay, baseline, update count,
rng) and `progress` (JSON: stream position, counters). Orbax commits a step atomically and off the training path.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dvi_jax.errors import UserError
from dvi_jax.learn.distill import DistillState
from dvi_jax.learn.fast_update import LearnerState

State = TypeVar("State", LearnerState, DistillState)


class Snapshots:
    """The newest `keep` snapshots under `directory`. Use as a context manager: leaving waits for saves."""

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

    def save(self, state: State, progress: dict[str, Any]) -> None:
        """Save asynchronously under `state.step`."""
        # A copy of our own: the next update donates these arrays while the save may still be reading them.
        copied = jax.tree.map(jnp.copy, _raw(state))
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(learner=ocp.args.StandardSave(copied), progress=ocp.args.JsonSave(progress)),
        )

    def restore(self, template: State) -> tuple[State, dict[str, Any]] | None:
        """The newest snapshot in the structure of `template`, None if there is none yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _raw(template))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(learner=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
        typed = jax.tree.map(
            lambda old, new: jax.random.wrap_key_data(new) if _is_key(old) else new, template, restored["learner"]
        )
        return typed, restored["progress"]


def refuse_earlier_run(out: Path) -> None:
    """Raise `UserError` if a run already left snapshots in `out`."""
    snapshots = out / "snapshots"
    if snapshots.is_dir() and any(snapshots.iterdir()):
        raise UserError(f"{out} holds an earlier run: pass --resume to go on with it, or choose another out")


def _raw(state: State) -> State:
    """Typed PRNG keys as plain integers, which is what orbax stores."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
