"""How an engine drafts: by one plan, or by whichever of a few gives most tokens a second as things are.

All plans of an engine give equal bits, so it may change from any stretch to the next. A round costs what it costs
however many slots are in use, since free ones are computed too: what a plan costs depends on the number of slots and
is measured once, and what it brings is followed while requests are served.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import check_rows
from dvi_jax.decode.choosing import (
    MOST_ROUND_ROWS,
    Followed,
    costs_path,
    options,
    read_costs,
    write_costs,
)
from dvi_jax.decode.plan import PLAIN, Plan, check_plan, rows_alike
from dvi_jax.errors import notice
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import replicas
from dvi_jax.model.product_blocks import MOST_ROWS
from dvi_jax.processes import told
from dvi_jax.serve.compiling import compile_stretches
from dvi_jax.serve.slots import MOST_ROUNDS, Slots, calls_of, run_stretch

AUTO = "auto"
TREES = (4, 8, 16)  # rows of trees to choose from
MOST_AUTO_DRAFTS, CPU_DRAFTS = 5, 3  # of a round, to choose from; on a CPU every round verifies as many rows
MEASURED_POSITION = 512  # where sequences are when a round is timed, if slots have so many positions
REPEATS = 3
# Stretches that draft nothing until one tries again, at least. One that drafts costs more than its rounds: nobody knows
# beforehand which replies end with it, so that their slots go to nobody until the stretch behind it is over.
RETRY = 16
# Of rounds that are a reply's: what a slot's round still counts for after its next, and the rounds of a slot for which
# a plan is taken to lose as many as drafting does, drafting as plain decoding, and that none.
USE_MEMORY, USE_PRIOR = 0.9975, 16
PIECES = (1, 2, 4, 8)  # rounds that a piece may have: every number is a program of its own
MEASURED_PIECE = PIECES[-1]  # rounds of a piece when a round is timed: small models need not compile another
# All that the host does for a piece, as a multiple of starting one on a device that is free: reading it, handing its
# tokens on, taking prompts in behind it. Beside two H100s, with 8 and 16 slots.
HOST_STARTS = 3.5
START = "start"  # among the costs that are kept: the host's seconds for starting a piece


class PlanChoice(Protocol):
    """Chooses between stretches, among plans that give equal bits."""

    width: int  # most tokens that a round commits; where bits depend on the number of rows, as many are verified
    plans: tuple[Plan, ...]  # all that may be chosen
    plan: Plan  # of the last stretch
    gain: float | None  # as of `EngineStatus`
    pieces: Mapping[Plan, int]  # rounds of a piece of each (`slots.run_stretch`); 0: stretches are not in pieces

    def next_plan(self, *, fresh: bool) -> Plan:
        """Of the next stretch; `fresh`: it decodes sequences for which the drafter has seen every row."""

    def add(self, plan: Plan, accept_lengths: np.ndarray, drafted: np.ndarray, fresh: np.ndarray) -> None:
        """What came of a stretch by `plan`: committed and drafted in each round [B, rounds], and who was fresh [B]."""

    def count(self, plan: Plan, used: int, computed: int) -> None:
        """Of `computed` rounds by `plan`, each of one slot, `used` were a reply's and the others behind its end."""


class OnePlan:
    """Always the same."""

    def __init__(self, plan: Plan, width: int, piece: int = 0):
        self.plan, self.width, self.gain = plan, width, None if plan.drafts else 0.0
        self.plans: tuple[Plan, ...] = (plan,)
        self.pieces: Mapping[Plan, int] = {plan: piece}

    def next_plan(self, *, fresh: bool) -> Plan:
        """The plan."""
        return self.plan

    def add(self, plan: Plan, accept_lengths: np.ndarray, drafted: np.ndarray, fresh: np.ndarray) -> None:
        """Changes nothing."""

    def count(self, plan: Plan, used: int, computed: int) -> None:
        """Changes nothing."""


class BestPlan(Followed):
    """The plan that is worth most: the tokens that its rounds can be expected to give, over what a round costs.

    Some rounds give nothing: a slot whose reply has ended waits for the end of the stretch. Drafts make that more, as a
    reply has fewer rounds then, and as nobody knows beforehand which is its last. So it is counted, and counts.

    Where that is plain decoding, drafting is tried again now and then (`Followed.choose`). Then few sequences are such
    that the drafter has seen every row of them, and those are at their beginning, where drafts are right less often.
    The others say what is accepted at least. So both are followed, and what is better of the two is expected.
    """

    def __init__(
        self, costs: Mapping[Plan, float], width: int, pieces: Mapping[Plan, int] | None = None, slots: int = 1
    ):
        """`costs`: seconds of a round of all `slots` by each plan, plain decoding among them."""
        super().__init__(slots, RETRY)
        self._of_all = Followed(slots)  # sequences, those included of which the drafter has missed rows
        self._slots = slots
        # Rounds used and computed, of each plan and of all that draft (None).
        self._rounds: dict[Plan | None, tuple[float, float]] = dict.fromkeys((*costs, None), (0.0, 0.0))
        self.costs, self.width, self.plans = dict(costs), width, tuple(costs)
        self.pieces: Mapping[Plan, int] = pieces or dict.fromkeys(costs, 0)
        self.plan = max(self.plans, key=self._worth)
        self.gain: float | None = self._worth(self.plan) / self._worth(PLAIN) - 1

    def next_plan(self, *, fresh: bool) -> Plan:
        """The best, or one that is worth another try."""
        worth = {plan: self._worth(plan) for plan in self.plans}
        self.gain = max(worth.values()) / worth[PLAIN] - 1
        self.plan = self.choose(worth, [plan for plan in self.plans if plan.drafts], may_try=fresh)
        return self.plan

    def add(self, plan: Plan, accept_lengths: np.ndarray, drafted: np.ndarray, fresh: np.ndarray) -> None:
        """Follow how often drafts are right."""
        real = accept_lengths > 0
        for followed, counted in ((self, real & fresh[:, None]), (self._of_all, real)):
            followed.follow(plan, [accept_lengths[counted]], [drafted[counted]])  # one sequence after the other

    def count(self, plan: Plan, used: int, computed: int) -> None:
        """Follow how many rounds were of use."""
        memory = USE_MEMORY ** (computed / self._slots)
        for kind in (plan, None) if plan.drafts else (plan,):
            before = self._rounds[kind]
            self._rounds[kind] = memory * before[0] + used, memory * before[1] + computed

    def _share_used(self, plan: Plan) -> float:
        """Of the rounds by a plan."""
        share, prior = 1.0, USE_PRIOR * self._slots
        for kind in (PLAIN, None, plan) if plan.drafts else (PLAIN,):
            used, computed = self._rounds[kind]
            share = (used + prior * share) / (computed + prior)
        return share

    def _worth(self, plan: Plan) -> float:
        tokens = max(self.tokens(plan), self._of_all.tokens(plan))
        return tokens * self._share_used(plan) / self.costs[plan]


def plans_of(model: LoadedModel, name: str, slots: int) -> tuple[tuple[Plan, ...], int]:
    """The plans that `name` stands for (`AUTO`: several), and the width of all.

    `UserError` for one that model and device cannot follow.
    """
    slots = -(-slots // replicas(model.definition.mesh))  # of each device
    if name == AUTO:
        # Where a row's bits are the same among any number of rows, what more of them cost is measured.
        alike = rows_alike(2 * slots, model.config, model.manifest.dtype)
        most_rows = MOST_ROWS if alike else MOST_ROUND_ROWS
        if 2 * slots > most_rows:  # a draft would make rounds slower by more than it can bring
            return (PLAIN,), 1
        most = CPU_DRAFTS if jax.default_backend() == "cpu" else MOST_AUTO_DRAFTS
        found = options(model, DecodeConfig(draft_steps=most), slots, most_rows=most_rows, trees=TREES)
        return tuple(option.plan for option in found), max(option.width for option in found)
    plan = Plan.parse(name)
    check_plan(plan, model.manifest.drafter, drafts_blocks=model.drafts_blocks, max_drafts=model.max_drafts)
    check_rows(model, plan, slots)
    alike = rows_alike(slots * plan.rows, model.config, model.manifest.dtype)
    return (plan,), plan.drafts + 1 if alike else plan.rows


def choose(
    model: LoadedModel, plans: Sequence[Plan], width: int, slots: Slots, *, ahead: bool = False
) -> tuple[PlanChoice, Slots]:
    """A choice among `plans`, whose costs are read from disk, or measured in `slots`, all free, and kept there.

    The slots come back free. `ahead`: stretches are in pieces, which a device can be given while it is at work.
    """
    if len(plans) == 1 and not ahead:
        return OnePlan(plans[0], width), slots
    (count, room), piece = slots.decode.tokens.shape, MEASURED_PIECE if ahead else 0
    path = costs_path(model, count, room, width, "slots", piece)
    is_alone = jax.process_count() == 1  # several measure together at each start, and the first one's count
    known = read_costs(path) if is_alone else {}
    needed = {*map(str, plans), START} if ahead else {*map(str, plans)}
    if not needed <= known.keys():
        if len(plans) > 1:
            names = ", ".join(map(str, plans))
            once = " once" if is_alone else ""
            notice(f"--plan auto measures{once} what rounds of all {count} slots cost here ({names})")
        began = time.perf_counter()
        measured, starting, slots = round_seconds(model, slots, plans, piece=piece)
        if len(plans) > 1:
            took = ", ".join(f"{plan} {seconds:.3g}" for plan, seconds in measured.items())
            notice(f"measured in {time.perf_counter() - began:.0f} s, seconds of a round: {took}")
        known = told(lambda: known | {str(plan): seconds for plan, seconds in measured.items()} | {START: starting})
        if is_alone:
            write_costs(path, known)
    costs = {plan: known[str(plan)] for plan in plans}
    pieces = {plan: piece_rounds(seconds, known[START]) if ahead else 0 for plan, seconds in costs.items()}
    if len(plans) == 1:
        return OnePlan(plans[0], width, pieces[plans[0]]), slots
    return BestPlan(costs, width, pieces, count), slots


def piece_rounds(seconds: float, starting: float) -> int:
    """Rounds of a piece, of rounds that take so long: as few as take the device longer than a piece takes the host.

    A slot whose reply has ended waits for the end of the piece under way and for the next one. `starting`: the host's
    seconds for starting one, which tell how fast it is.
    """
    host = HOST_STARTS * starting
    return next(rounds for rounds in PIECES if rounds * seconds >= host or rounds == PIECES[-1])


def round_seconds(
    model: LoadedModel, slots: Slots, plans: Sequence[Plan], *, piece: int = 0
) -> tuple[dict[Plan, float], float, Slots]:
    """Seconds of a round of each plan in which every slot drafts all it may, and of the host for starting a piece.

    From stretches of two lengths: the difference is free of what starting one takes, but for a further piece's start,
    which the device hides. The plans take turns, so that a device that is warmer, or busier, by and by is so for all.
    The slots come back free.
    """
    program, lengths = (model.definition, model.decode_params), (piece or MOST_ROUNDS // 4, MOST_ROUNDS)
    compile_stretches(*program, slots, [(plan, piece, False) for plan in plans])
    seconds: dict[tuple[Plan, int], list[float]] = {(plan, rounds): [] for plan in plans for rounds in lengths}
    starting: list[float] = []
    for _ in range(REPEATS + 1):
        for (plan, rounds), times in seconds.items():
            slots = jax.block_until_ready(_set_under_way(slots))
            began = time.perf_counter()
            for limit in calls_of(rounds, piece):
                given = time.perf_counter()
                slots = run_stretch(*program, slots, limit, plan, sampled=False, piece=piece)
                starting.append(time.perf_counter() - given)
            jax.block_until_ready(slots.told)
            times.append(time.perf_counter() - began)
    costs = {}
    for plan in plans:
        few, many = (statistics.median(seconds[plan, rounds][1:]) for rounds in lengths)
        costs[plan] = max(many - few, 0.1 * many) / (lengths[1] - lengths[0])
    return costs, statistics.median(starting), _set_free(slots)


@partial(jax.jit, donate_argnames="slots")
def _set_under_way(slots: Slots) -> Slots:
    """Every slot in the middle of a reply that goes on for a stretch at least, if there is room for that."""
    state = slots.decode
    positions, width = state.tokens.shape[1], state.committed.hidden.shape[1]
    length = max(2, min(MEASURED_POSITION, positions - (MOST_ROUNDS + 1) * width))
    full = jnp.full_like(state.length, length)
    committed = state.committed.replace(start=full - 2)
    limit = jnp.full_like(full, positions - width)
    state = state.replace(length=full, limit=limit, done=jnp.zeros_like(state.done), committed=committed)
    return slots._replace(decode=state)


@partial(jax.jit, donate_argnames="slots")
def _set_free(slots: Slots) -> Slots:
    return slots._replace(decode=slots.decode.replace(done=jnp.ones_like(slots.decode.done)))
