"""The drafter that learns while an engine serves: windows of replies, and updates that nobody waits for.

The device takes an update like any other program, behind the rounds under way; what it came to is looked at once it is
there, and only then may the weights be drafted with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.memory import check_room, tree_bytes
from dvi_jax.learn.fast_update import Batch, LearnerState, Trainable, fast_update, init_learner
from dvi_jax.learn.replay import Replay, Windows, window_bytes
from dvi_jax.loading import LoadedModel
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learning import compare, copied, keep, newest

TIMED = 4  # updates by which it is known how long one takes


class _Update(NamedTuple):
    """One that the device was given."""

    values: dict[str, jax.Array]  # its metrics
    failing: jax.Array  # int32, as in `Learnt`
    rate: float


@dataclass(frozen=True)
class Learnt:
    """What an update came to."""

    values: dict[str, float]  # its metrics
    failing: int  # updates in a row up to it whose gradients were not finite
    rate: float  # of it, as a share of the optimiser's rates


class Candidate:
    """A drafter's weights with an optimiser's state and a replay. For one thread."""

    def __init__(self, model: LoadedModel, settings: LearnSettings, context: int, clock: Callable[[], float]):
        """Take the memory and compile. `UserError` where the memory does not hold what is needed."""
        self._model, self._settings = model, settings
        average = settings.average if model.drafter_is_trained else 0.0
        self._optimizer = replace(settings.optimizer, average=average)
        self._window = min(settings.window, context)
        fresh, kept = settings.fresh_windows, settings.replayed_windows
        self._positions = min(settings.positions, fresh * (self._window - 1))
        self._size = Batch(0, kept, self._positions)
        width, taps = model.config.hidden_size, len(model.taps)
        replay = Replay.empty(self._capacity(), self._window, width, taps, settings.branches)
        self._state = init_learner(model.params, self._optimizer, replay, jax.random.key(settings.seed))
        self._arrived: list[jax.Array] = []  # lengths of windows that were not counted yet
        self._update: _Update | None = None
        self._new_positions = 0  # of windows since the last update
        self.seconds = self._warm_up(clock)  # of an update, on a device that does nothing else

    def _capacity(self) -> int:
        """Windows that fit; `UserError` where the least that makes sense does not."""
        settings, config = self._settings, self._model.config
        window = window_bytes(self._window, config.hidden_size, len(self._model.taps), settings.branches)
        capacity = max(settings.fresh_windows, min(settings.replay_capacity, settings.replay_bytes // window))
        moving = tree_bytes(self._model.params.drafter) + tree_bytes(self._model.params.lora_s)
        # Weights of four drafters (good, tried, live, candidate), with two moments and perhaps an average each; and
        # while an update runs gradients, and what it replaces.
        states = 4 * 4 + 3 if self._optimizer.average else 4 * 3 + 2
        check_room(capacity * window + states * moving, f"--learn: {capacity} windows and the optimiser's states")
        return capacity

    # Windows.

    def take(self, windows: Windows) -> None:
        """A window of all positions of a slot; cut and kept on the device."""
        replay, length = keep(self._state.replay, windows, self._window)
        self._state = self._state.replace(replay=replay)
        self._arrived.append(length)

    def has_enough(self) -> bool:
        """Whether new positions lie there, a quarter as many as an update looks at; the others are seen again."""
        while self._arrived and is_ready(self._arrived[0]):
            self._new_positions += int(self._arrived.pop(0))
        return 4 * self._new_positions >= self._positions

    # Updates.

    @property
    def is_updating(self) -> bool:
        """Whether an update was begun and not looked at."""
        return self._update is not None

    @property
    def has_updated(self) -> bool:
        """Whether that one can be looked at without waiting."""
        return self._update is not None and is_ready(self._update.values)

    def begin_update(self, rate: float) -> None:
        """Give the device one fast update, of `rate` as a share of the optimiser's rates."""
        settings, model = self._settings, self._model
        self._state, values = fast_update(
            model.definition,
            model.params,
            self._state,
            newest(self._state.replay, settings.fresh_windows),
            np.array(False),
            objective=settings.objective,
            optimizer=self._optimizer,
            size=self._size,
            rate=rate,
        )
        self._new_positions = 0
        # A copy: the next update uses up the optimiser's state.
        self._update = _Update(values, copied(self._state.optimizer.notfinite_count), rate)

    def look(self) -> Learnt:
        """What the update under way came to, once it has."""
        assert self._update is not None
        update, self._update = self._update, None
        values, failing = jax.device_get((update.values, update.failing))
        return Learnt({name: float(value) for name, value in values.items()}, int(failing), update.rate)

    # Points that one may go back to.

    def point(self) -> LearnerState:
        """The state as it is, without windows; updates do not touch its arrays."""
        return self._state.replace(**_rest(self._state), replay=Replay.empty(1, 1, 1))

    def go_on_from(self, point: LearnerState) -> None:
        """Begin at `point`, whose arrays stay, with the windows that there are."""
        self._state = point.replace(**_rest(point), replay=self._state.replay)

    @property
    def state(self) -> LearnerState:
        """The state as it is; the next update uses it up."""
        return self._state

    def agreements(self, good: Trainable, live: Trainable) -> tuple[float, float, float]:
        """How often two drafters choose as the verifier, on the newest windows, and the standard error between them."""
        settings, model = self._settings, self._model
        windows = newest(self._state.replay, settings.fresh_windows)
        found = compare(
            model.definition,
            model.params,
            good,
            live,
            windows,
            self._state.key,
            objective=settings.objective,
            count=self._positions,
        )
        first, second, error = map(float, jax.device_get(found))
        return first, second, error

    def _warm_up(self, clock: Callable[[], float]) -> float:
        """Compile every program, on no windows, so that no reply waits for one. -> seconds of an update."""
        begun = self.point()
        self.begin_update(1.0)
        self.look()
        began = clock()
        for _ in range(TIMED):  # one behind the other, as behind rounds
            self.begin_update(1.0)
        self.look()
        seconds = (clock() - began) / TIMED
        self.go_on_from(begun)
        self.agreements(begun.served, begun.served)
        jax.tree.map(jnp.copy, begun)  # as a snapshot will
        return seconds


def is_ready(tree: Any) -> bool:
    """Whether the device has come to all of it."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))


def _rest(state: LearnerState) -> dict[str, Any]:
    """Copies of what an update uses up, windows apart."""
    return copied({"optimizer": state.optimizer, "baseline": state.baseline, "step": state.step, "key": state.key})
