"""What learning costs an online run: stretches with and without updates in turn, over the same prompts, in one process.

A run's speed differs from one start to the next by more than its updates cost, and drifts while it lasts. So a pair is
two stretches that follow each other, whichever first in turn, and the cost is the median over pairs. The updates have
a learning rate too small to move a weight: all stretches decode the same rounds, which is checked.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from dvi_jax.config import TrainConfig
from dvi_jax.data.prompts import Prompt
from dvi_jax.decode.batch import Generation
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.new_drafter import kept_or_new_drafter
from dvi_jax.learn.online import OnlineRun, with_new_lora_d
from dvi_jax.learn.shared_directory import open_directory

STILL = 1e-30  # a learning rate that moves no float32 weight

SomeRun = TypeVar("SomeRun", bound=OnlineRun)


@dataclass(frozen=True)
class Stretch:
    """What some rollouts took, with the updates after them if there were any."""

    seconds: float
    tokens: int  # new ones
    digest: str  # of every reply's ids and accept lengths
    rollout_seconds: float  # of `seconds`
    update_seconds: float  # of `seconds`: updates, and waiting for them


class Stretches(OnlineRun):
    """A run that decodes the same prompts as often as one likes."""

    def stretch(self, cycles: list[list[list[Prompt]]], *, updates: int) -> Stretch:
        """Rollouts of each cycle's batches, and `updates` updates after the last of them."""
        self.config = replace(self.config, updates_per_rollout=updates)
        self._outputs, self._parts, tokens = hashlib.sha256(), [0.0, 0.0], self.progress.new_tokens
        began = time.perf_counter()
        for batches in cycles:
            self._update(batches)
        seconds = time.perf_counter() - began
        return Stretch(seconds, self.progress.new_tokens - tokens, self._outputs.hexdigest(), *self._parts)

    def log(self, kind: str, values: dict[str, Any]) -> None:
        super().log(kind, values)
        if kind == "train":
            for index, part in enumerate(("rollout_seconds", "update_seconds")):
                self._parts[index] += values[part]

    def _count(self, generations: list[Generation]) -> dict[str, Any]:
        for generation in generations:
            for numbers in (generation.new_ids, generation.accept_lengths):
                self._outputs.update(np.array([len(numbers), *numbers], np.int32).tobytes())
        return super()._count(generations)


def cost_of_learning(config: TrainConfig, *, prompts: int, pairs: int) -> dict[str, Any]:
    """`summarise` of `pairs` pairs of stretches over the first `prompts` prompts of the run.

    `UserError` for a run without updates, and for prompts that do not fill the rollouts before an update.
    """
    if not config.updates_per_rollout:
        raise UserError("updates_per_rollout is 0: a run that does not learn has no cost of learning")
    cycle = config.rollout_batch * config.update_every
    if prompts < cycle:
        raise UserError(f"--cost-prompts {prompts}: an update follows {cycle} prompts, so there must be as many")
    optimizer = replace(config.optimizer, lora_lr=STILL, head_lr=STILL, weight_decay=0.0)
    slow, rollback = replace(config.slow, lr=STILL), replace(config.rollback, collapse=0.0)
    still = replace(config, optimizer=optimizer, slow=slow, rollback=rollback)
    counts = 0, config.updates_per_rollout
    with opened(Stretches, still) as run:
        cycles = list(itertools.islice(run._cycles(), prompts // cycle))
        for updates in counts:  # compiles, and fills the replay
            run.stretch(cycles, updates=updates)
        measured = []
        for pair in range(pairs):
            order = counts if pair % 2 == 0 else counts[::-1]
            found = {updates: run.stretch(cycles, updates=updates) for updates in order}
            measured.append((found[counts[0]], found[counts[1]]))
    return summarise(measured) | {"rollouts": len(cycles) * config.update_every, "updates": len(cycles) * counts[1]}


@contextmanager
def opened(kind: type[SomeRun], config: TrainConfig) -> Iterator[SomeRun]:
    """An online run of this class that has not begun, in a directory that is removed."""
    checkpoint = open_checkpoint(config.checkpoint)
    checkpoint = kept_or_new_drafter(checkpoint, config.drafter, config.drafter_options, config.exit_layer)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_directory(f"{scratch}/run", keep=1, keep_best=0, resume=False, report=lambda kind, record: None) as out,
    ):
        yield kind(config, with_new_lora_d(checkpoint, config), out)


def summarise(pairs: Sequence[tuple[Stretch, Stretch]]) -> dict[str, Any]:
    """Of pairs (without updates, with them): medians of tokens per second, `off` and `on`, and of the share lost.

    `shares` has every pair's. `rollout_seconds` and `update_seconds` are medians of a stretch [without, with updates];
    `same_output` says whether all stretches had the same ids in the same rounds.
    """
    shares = [1 - (on.tokens / on.seconds) / (off.tokens / off.seconds) for off, on in pairs]
    rates = [
        statistics.median(stretch.tokens / stretch.seconds for stretch in kind) for kind in zip(*pairs, strict=True)
    ]

    def medians(name: str) -> list[float]:
        return [statistics.median(getattr(stretch, name) for stretch in kind) for kind in zip(*pairs, strict=True)]

    return {
        "off": rates[0],
        "on": rates[1],
        "share": statistics.median(shares),
        "shares": shares,
        "rollout_seconds": medians("rollout_seconds"),
        "update_seconds": medians("update_seconds"),
        "same_output": len({stretch.digest for pair in pairs for stretch in pair}) == 1,
    }
