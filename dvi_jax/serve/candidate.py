"""The drafter that learns while an engine serves: windows of replies, and updates that nobody waits for.

The device takes an update like any other program, behind the rounds under way; what it came to is looked at once it is
there, and only then may the weights be drafted with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import ObjectiveConfig, OptimizerConfig
from dvi_jax.decode.memory import check_room, tree_bytes
from dvi_jax.learn.fast_update import Batch, LearnerState, Trainable, init_learner
from dvi_jax.learn.first_weights import NormalEquations
from dvi_jax.learn.replay import Replay, window_bytes
from dvi_jax.loading import LoadedModel
from dvi_jax.serve.compiling import compile_all
from dvi_jax.serve.ended import Ended
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learning import REPORTED, add_newest, compare, copied, drafts_told_apart, keep, solve, update
from dvi_jax.serve.places import Places, on_its_way, written_over
from dvi_jax.serve.worker import Worker

# New positions, as a multiple of the inputs of a first map (`learn/first_weights.py`), before each time it is solved.
# Updates go on from there, as more rows tell little more; or, where replies are rare, so many seconds after the first.
SOLVE_AT, PATIENCE = (2, 2, 4), 120.0
# Hidden sizes up to which, by counting multiplications, Muon takes no more than the rest of an update, and solving no
# more than rounds can wait for.
WIDEST_MUON, WIDEST_SOLVED = 2048, 4096
# Updates behind another, and how often: the quickest tell how long one takes the device. One that takes so many seconds
# by itself is taken at that: what it takes the host is little of it.
TIMED, SERIES, LONG = 4, 3, 0.05
COMPARED = 16  # newest windows, at most, that two drafters are compared on


Kind = Literal["update", "solved"]  # solved: first weights, in place of an update


class _Arriving(NamedTuple):
    """A window that was kept, until what the device made of it is known."""

    length: jax.Array  # int32 []: its valid positions; 0 where it could not be used
    expected: int  # what that should be


class _Update(NamedTuple):
    """One that the device is given."""

    kind: Kind
    report: Future[jax.Array]  # as of `learning.update`, once the device has the program
    rate: float
    positions: int  # new ones, as far as they were counted


@dataclass(frozen=True)
class Learnt:
    """What an update came to."""

    kind: Kind
    values: dict[str, float]  # its metrics, those of `REPORTED`
    failing: int  # updates in a row up to it whose gradients were not finite
    rate: float  # of it, as a share of the optimiser's rates


class Candidate:
    """A drafter's weights with an optimiser's state and a replay. For one thread, the engine's.

    To give the device an update takes the host milliseconds, a few hundred arrays and kernels, so a thread of its own
    does it. Until it has, weights and windows are that one's: `wants_more` is False, and the rest waits for `look`.
    """

    def __init__(self, model: LoadedModel, settings: LearnSettings, context: int, clock: Callable[[], float]):
        """Take the memory and compile. `UserError` where the memory does not hold what is needed."""
        self._model, self._settings, self._clock = model, settings, clock
        self._optimizer = _optimizer(model, settings)
        self._window = min(settings.window, context, model.config.context_length)  # no slot of an engine has more
        fresh, kept = settings.fresh_windows, settings.replayed_windows
        affordable = max(settings.logits_bytes // (4 * model.config.vocab_size), 1)
        self._positions = min(settings.positions, fresh * (self._window - 1), affordable)
        self._size = Batch(0, kept, self._positions)
        width, taps = model.config.hidden_size, len(model.taps)
        # What replies tell of first weights, until the last of them; how often they were solved, and when at first.
        begins = not model.drafter_is_trained and width <= WIDEST_SOLVED
        self._equations = NormalEquations.empty(model) if begins else None
        self._solves, self._solved_at = 0, 0.0
        self.replay = Replay.empty(self._capacity(), self._window, width, taps, settings.branches)
        self._no_windows = Replay.empty(1, 1, 1)  # of a point
        self._points: list[LearnerState] = []  # that `next_point` made, to be written over again
        key = jax.random.key(settings.seed)
        # Its arrays are its own, and the next update uses them up. Windows are beside it.
        self.state = copied(init_learner(model.params, self._optimizer, self._no_windows, key).replace(replay=None))
        # What programs tell, where it stays.
        self._places = Places(stay=True)
        self._report = jnp.zeros(len(REPORTED) + 1, jnp.float32)
        self._update: _Update | None = None
        self._giving = Worker("updates")
        # What a new drafter often learns: a round's first draft, which pays before the others do.
        self._of_first = settings.objective
        if not settings.branches and drafts_told_apart(model, settings.objective.unroll_steps) > 1:
            self._of_first = replace(settings.objective, unroll_steps=1)
        # Of windows since the last update was begun: how many, their positions, and those not counted in these yet.
        self._new_windows, self._new_positions = 0, 0
        self._arriving: list[_Arriving] = []
        # All on a device that does nothing else: of first weights, with the windows before, and of an update.
        self.seconds_of_solving = 0.0
        self.seconds, self.seconds_of_first = self._warm_up(clock)

    def _capacity(self) -> int:
        """Windows that fit; `UserError` where the least that makes sense does not."""
        settings, config = self._settings, self._model.config
        window = window_bytes(self._window, config.hidden_size, len(self._model.taps), settings.branches)
        capacity = max(settings.fresh_windows, min(settings.replay_capacity, settings.replay_bytes // window))
        moving = tree_bytes(self._model.params.drafter) + tree_bytes(self._model.params.lora_s)
        # Weights of five drafters (good, tried, live, the one before it, candidate) and of one that a snapshot copies,
        # with two moments and perhaps an average each; those that an engine drafts with; and while an update runs
        # gradients.
        states = 6 * 4 + 2 if self._optimizer.average else 6 * 3 + 2
        beginning = 4 * tree_bytes(self._equations)  # and what solving takes
        drafts = drafts_told_apart(self._model, settings.objective.unroll_steps)
        logits = 4 * (2 * drafts + 1) * self._positions * config.vocab_size  # the verifier's, drafts' and gradients
        room = capacity * window + states * moving + beginning + logits
        check_room(room, f"--learn: {capacity} windows, the optimiser's states and logits")
        return capacity

    # Windows.

    def wants_more(self) -> bool:
        """Whether the next update has a use for another window; the host pays a millisecond for each that is kept.

        An update takes the `fresh_windows` newest. Once there are so many that no update has seen, with positions
        enough to begin the next, another would only push one of them out that is older by less than the time between
        two updates. What is drawn from the replay beside them was then seen before, but comes from longer ago, and
        mostly for other positions: of long windows an update looks at a part. First weights have a use for each.
        """
        if self._update is not None and not self._update.report.done():
            return False
        if self._new_windows < self._settings.fresh_windows:
            return True
        if self.has_enough():
            return False
        # Replies that end together would all be kept if lengths on their way did not count. One that turns out to be
        # empty counts no more once it is there, so that another takes its place.
        return not self._is_enough(sum(window.expected for window in self._arriving))

    def take(self, ended: Ended) -> None:
        """The newest window of a reply, kept on the device."""
        expected = min(abs(int(np.asarray(ended.place)[2])), self._window)
        self.replay, length = keep(self.replay, ended, window=self._window, branches=self._settings.branches)
        length.copy_to_host_async()
        self._arriving.append(_Arriving(length, expected))
        self._new_windows += 1
        if self._equations is not None:
            self._equations = add_newest(self._model.definition, self._model.params, self._equations, self.replay)
            if self._solves and self._clock() - self._solved_at > PATIENCE:
                self._equations = None

    def has_enough(self) -> bool:
        """Whether new positions lie there, a quarter as many as an update looks at; the others are seen again.

        While a drafter has no first weights, as many as these take.
        """
        while not self._is_enough() and self._arriving and is_ready(self._arriving[0].length):
            self._new_positions += int(np.asarray(self._arriving.pop(0).length))
        return self._is_enough()

    def _is_enough(self, more: int = 0) -> bool:
        begins, found = self._equations, self._new_positions + more
        return found >= (self._positions / 4 if begins is None else SOLVE_AT[self._solves] * len(begins.gram))

    # Updates.

    @property
    def is_updating(self) -> bool:
        """Whether an update was begun and not looked at."""
        return self._update is not None

    @property
    def has_updated(self) -> bool:
        """Whether that one can be looked at without waiting."""
        if self._update is None or not (report := self._update.report).done():
            return False
        return report.exception() is not None or is_ready(report.result())

    def begin_update(self, rate: float, *, first_drafts: bool = False) -> None:
        """Have the device given one fast update, of `rate` as a share of the optimiser's rates.

        `first_drafts`: it learns a round's first drafts alone, which takes less time.
        """
        objective = self._of_first if first_drafts else self._settings.objective
        self._begin("update", partial(self._give_update, rate, objective), rate)

    @property
    def is_beginning(self) -> bool:
        """Whether first weights are to come, by `begin_solving`, before updates."""
        return self._equations is not None

    def have_begun(self) -> None:
        """The weights are no first ones: an earlier run's."""
        self._equations = None

    def begin_solving(self) -> None:
        """Have the device work first weights out, of all texts so far."""
        assert self._equations is not None
        if not self._solves:
            self._solved_at = self._clock()
        self._begin("solved", partial(self._give_solving, self._equations), 1.0)
        self._solves += 1
        if self._solves == len(SOLVE_AT):
            self._equations = None

    def _begin(self, kind: Kind, give: Callable[[], jax.Array], rate: float) -> None:
        self._update = _Update(kind, self._giving.submit(give), rate, self._new_positions)
        self._new_windows = self._new_positions = 0
        self._arriving.clear()  # the update sees them, counted or not

    def _give_update(self, rate: float, objective: ObjectiveConfig) -> jax.Array:
        """-> its report."""
        self.state, self._report = self._updating(rate, objective)()
        return on_its_way(self._report)

    def _give_solving(self, equations: NormalEquations) -> jax.Array:
        """-> its report."""
        self.state, self._report = self._solving(equations)()
        return on_its_way(self._report)

    # Programs with what they are given: to be run, or compiled beside others.

    def _updating(self, rate: float, objective: ObjectiveConfig) -> partial[Any]:
        model, moved = self._model, self._places.put(np.array(rate, np.float32))
        given = model.definition, model.params, self.state, self._report, self.replay, moved
        fresh = self._settings.fresh_windows
        return partial(update, *given, fresh=fresh, objective=objective, optimizer=self._optimizer, size=self._size)

    def _solving(self, equations: NormalEquations) -> partial[Any]:
        model, fresh = self._model, self._settings.fresh_windows
        given = model.definition, model.params, self.state, self._report, equations, self.replay
        return partial(solve, *given, fresh=fresh, objective=self._of_first, count=self._positions)

    def _comparing(self, good: Trainable, live: Trainable) -> partial[Any]:
        model, compared = self._model, min(COMPARED, len(self.replay.windows.length))
        given = model.definition, model.params, good, live, self.replay, self.state.key
        count = min(self._positions, compared * (self._window - 1))
        return partial(compare, *given, fresh=compared, objective=self._settings.objective, count=count)

    def look(self) -> Learnt:
        """What the update under way came to, once it has; raises what giving it to the device has raised."""
        assert self._update is not None
        begun, self._update = self._update, None
        *found, failing = np.asarray(begun.report.result()).tolist()
        values = dict(zip(REPORTED, found, strict=True))
        if begun.kind == "solved":  # of all new ones; what is reported is of some
            values["positions"] = begun.positions
        return Learnt(begun.kind, values, int(failing), begun.rate)

    # Points that one may go back to.

    def point(self) -> LearnerState:
        """The state as it is, in arrays that updates leave alone."""
        return copied(self.state).replace(replay=self._no_windows)

    def next_point(self, in_use: Collection[LearnerState]) -> LearnerState:
        """The same, in the arrays of an earlier one that is not `in_use`, which are used up; or in new ones.

        What a device is asked for beside an engine's programs moves their temporaries (`places.py`).
        """
        for number, free in enumerate(self._points):
            if not any(free is other for other in in_use):
                again = written_over(free.replace(replay=None), self.state).replace(replay=self._no_windows)
                self._points[number] = again
                return again
        point = self.point()
        self._points.append(point)
        return point

    def go_on_from(self, point: LearnerState) -> None:
        """Begin at `point`, whose arrays stay, with the windows that there are."""
        self.state = copied(point.replace(replay=None))

    def agreements(self, good: Trainable, live: Trainable) -> tuple[float, float, float]:
        """How often two drafters choose as the verifier, on the newest windows, and the standard error between them."""
        first, second, error = np.asarray(self._comparing(good, live)()).tolist()
        return first, second, error

    def _warm_up(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Compile every program, on no windows, so that no reply waits for one.

        -> seconds of an update, and of one of first drafts.
        """
        begun = self.point()
        compile_all(map(_lowered, self._large_programs(begun.served)))
        if self._equations is not None:
            self.seconds_of_solving = self._timed_solving(clock, self._equations)
        seconds = self._timed(clock, first_drafts=False)
        of_first = seconds if self._of_first == self._settings.objective else self._timed(clock, first_drafts=True)
        self.go_on_from(begun)
        for _ in range(2):  # in new arrays, and over those
            self.next_point(())
        self.agreements(begun.served, begun.served)
        jax.tree.map(jnp.copy, begun)  # as a snapshot will
        return seconds, of_first

    def _large_programs(self, served: Trainable) -> Iterator[partial[Any]]:
        """What takes long to compile."""
        model, equations = self._model, self._equations
        yield self._comparing(served, served)
        for objective in {self._settings.objective, self._of_first}:
            yield self._updating(1.0, objective)
        if equations is not None:
            yield self._solving(equations)
            yield partial(add_newest, model.definition, model.params, equations, self.replay)

    def _timed_solving(self, clock: Callable[[], float], equations: NormalEquations) -> float:
        """Seconds that first weights take once, and the windows before; what it adds are no rows."""
        model, seconds = self._model, []
        for _ in range(2):  # the first takes longer
            began = clock()
            equations = add_newest(model.definition, model.params, equations, self.replay)
            jax.block_until_ready(equations)
            added = clock()
            self._begin("solved", partial(self._give_solving, equations), 1.0)
            self.look()
            windows = SOLVE_AT[-1] * len(equations.gram) / self._window
            seconds.append(windows * (added - began) + clock() - added)
        self._equations = equations
        return seconds[-1]

    def _timed(self, clock: Callable[[], float], *, first_drafts: bool) -> float:
        """Seconds of an update behind rounds, where the device need not wait for the host to give it the update."""

        def seconds_of(updates: int) -> float:
            began = clock()
            for _ in range(updates):
                self.begin_update(1.0, first_drafts=first_drafts)
            self.look()
            return clock() - began

        seconds_of(1)  # the first takes longer
        # The quickest: a hiccup of the host would slow learning down for good.
        alone = min(seconds_of(1) for _ in range(SERIES))
        if alone > LONG:
            return alone
        behind = (min(seconds_of(1 + TIMED) for _ in range(SERIES)) - alone) / TIMED
        return max(behind, alone / 2)


def _optimizer(model: LoadedModel, settings: LearnSettings) -> OptimizerConfig:
    """What moves the weights: of a drafter from nothing quickly, of a trained one slowly, and on average."""
    if model.drafter_is_trained:
        return replace(settings.optimizer, average=settings.average)
    is_wide = model.config.hidden_size > WIDEST_MUON
    return replace(settings.optimizer, matrices="adamw" if is_wide else settings.matrices)


def _lowered(call: partial[Any]) -> jax.stages.Lowered:
    """A jitted function, for XLA."""
    function: Any = call.func
    return function.lower(*call.args, **call.keywords)


def is_ready(tree: Any) -> bool:
    """Whether the device has come to all of it."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))
