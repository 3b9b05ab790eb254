"""Choosing among plans while decoding (`--plan auto`): by what each costs on this device and by what is accepted.

Costs are measured once, each kept on disk as soon as it is known. Acceptance is followed draft by draft, newer rounds
counting for more. A plan is worth the tokens that its rounds can be expected to give, over what a round costs; the best
is taken anew for every generation, and between stretches of its rounds among the plans that give the same bits. Once a
generation drafts nothing it stays so: its drafter has missed rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import MOST_DRAFTS, DecodeConfig
from dvi_jax.decode.agreement import require_equal_bits
from dvi_jax.decode.batch import make_knobs, start
from dvi_jax.decode.cost import ROUNDS, round_seconds
from dvi_jax.decode.kept import kept_path
from dvi_jax.decode.kernel_loading import load_kernels
from dvi_jax.decode.plan import PLAIN, Option, Plan, plan_for, rows_alike
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import notice
from dvi_jax.loading import LoadedModel

STRETCH = 64  # rounds until the first choice; twice as many until the next, and so on
MEMORY = 0.995  # what a round still counts for after the next of its sequence
PRIOR_RATE, PRIOR_WEIGHT = 0.45, 2.0  # of the first draft, a weak drafter's, and the drafts that it counts for
RETRY = 8  # generations that draft nothing until one tries again, at least
MOST_LOSS = 0.005  # share of the time that trying again may cost where it is in vain
MEASURED_TOKENS = 128  # room of a measured generation, at most
CPU_TOKENS = 32  # the same at least, where few rounds are measured, with a short reply's own room and program
MEASURED_ROUNDS = 16  # of the shorter one on an accelerator, where rounds are short
DRAFTS = (1, 2, 3, 5, 8)  # numbers of drafts to choose from
FEW_DRAFTS = (1, 3)  # the same where each number of rows needs programs of its own, and rows are not free
TREES = (8, 16, 32)  # rows of trees to choose from, where a row's bits do not depend on how many there are
MOST_ROUND_ROWS = 64  # of a batch: a round's products read the weights once for so many
UNUSED_MEMORY = 0.97  # what a tree's rounds still count for after others were followed: drafters change
BRANCHES_SAVE = 0.4  # of the drafts that a chain has wrong, a tree is taken to have so many right until it is known

Counts = Sequence[int] | np.ndarray  # one for each round


@dataclass
class Acceptance:
    """How often each draft of a round is right where all before it were; old rounds fade."""

    memory: float = MEMORY  # what a round still counts for after the next
    judged: np.ndarray = field(default_factory=lambda: np.zeros(MOST_DRAFTS))
    right: np.ndarray = field(default_factory=lambda: np.zeros(MOST_DRAFTS))

    def add(self, accept_lengths: Counts, drafted: Counts) -> None:
        """Rounds in order; those that drafted nothing say nothing."""
        accepted, drafts, place = np.asarray(accept_lengths), np.asarray(drafted), np.arange(MOST_DRAFTS)
        accepted, drafts = accepted[drafts > 0, None], drafts[drafts > 0, None]
        fading = self.memory ** np.arange(len(drafts))[::-1]
        self.judged = self.memory ** len(drafts) * self.judged + fading @ ((place < drafts) & (place < accepted))
        self.right = self.memory ** len(drafts) * self.right + fading @ (place < accepted - 1)

    def tokens(self, drafts: int, prior: Sequence[float] | None = None) -> float:
        """Tokens that a round of so many drafts can be expected to give; `prior` as in `rates`."""
        return 1.0 + float(np.sum(np.cumprod(self.rates(prior, drafts))))

    def rates(self, prior: Sequence[float] | None = None, drafts: int = MOST_DRAFTS) -> list[float]:
        """How often each of so many drafts is right where those before it were.

        One that was seldom judged is taken to be as `prior` says, or else about as good as the one before it.
        """
        rates: list[float] = []
        for place in range(drafts):
            expected = prior[place] if prior else rates[-1] if rates else PRIOR_RATE
            rates.append((self.right[place] + PRIOR_WEIGHT * expected) / (self.judged[place] + PRIOR_WEIGHT))
        return rates


Choice = TypeVar("Choice", Plan, Option)


class Followed:
    """What the rounds of each plan have accepted, what they may be expected to give, and which is chosen for that."""

    def __init__(self, sequences: int = 1, retry: int = RETRY) -> None:
        """`sequences`: whose rounds come one after the other, and fade by what comes of each.

        `retry`: choices of plain decoding until another plan is tried again, at least.
        """
        self._memory = MEMORY ** (1 / sequences)
        self.acceptance = Acceptance(self._memory)  # of chains and blocks
        self.trees: dict[Plan, Acceptance] = {}
        self._plain, self._retry = 0, retry  # choices of plain decoding, one after the other

    def of(self, plan: Plan) -> Acceptance:
        """Where the rounds of a plan are counted."""
        return self.trees.setdefault(plan, Acceptance(self._memory)) if plan.kind == "tree" else self.acceptance

    def follow(self, plan: Plan, accept_lengths: Iterable[Counts], drafted: Iterable[Counts]) -> None:
        """Take in what rounds by `plan` accepted, those of one sequence after the other.

        What is known of trees that were not used fades, until they are taken to be worth what chains say they are.
        """
        acceptance = self.of(plan)
        for lengths, drafts in zip(accept_lengths, drafted, strict=True):
            acceptance.add(lengths, drafts)
        for tree, other in self.trees.items():
            if tree != plan:
                other.judged, other.right = UNUSED_MEMORY * other.judged, UNUSED_MEMORY * other.right

    def tokens(self, plan: Plan) -> float:
        """Tokens that a round by the plan can be expected to give."""
        prior = None
        if plan.kind == "tree":
            prior = [rate + BRANCHES_SAVE * (1 - rate) for rate in self.acceptance.rates(drafts=plan.drafts)]
        return self.of(plan).tokens(plan.drafts, prior)

    def choose(self, worth: Mapping[Choice, float], drafting: Collection[Choice], *, may_try: bool = True) -> Choice:
        """Which of `worth`, in tokens a second: the best.

        Where that drafts nothing, the best of `drafting` is tried now and then, if it may, so rarely that it costs half
        a percent at most where it is in vain.
        """
        best = max(worth, key=worth.__getitem__)
        self._plain = 0 if best in drafting else self._plain + 1
        if best in drafting or not may_try:
            return best
        other = max(drafting, key=worth.__getitem__, default=best)
        loss = worth[best] / worth[other] - 1  # of a try, in its own time
        if self._plain < max(self._retry, loss / MOST_LOSS):
            return best
        self._plain = 0
        return other


class PlanChooser(Followed):
    """Chooses for the generations of one model, one batch size and one way of sampling after the other."""

    def __init__(self, model: LoadedModel, costs: Mapping[Option, float]):
        """`costs`: seconds of a round of each option; `measured` finds them."""
        super().__init__()
        self.model, self.costs = model, dict(costs)

    @classmethod
    def measured(cls, model: LoadedModel, settings: DecodeConfig, prompt: Sequence[int], batch: int = 1) -> PlanChooser:
        """One whose costs are read from disk, or measured behind `prompt` (token ids) and kept there.

        A plan that is measured is also compared with plain decoding, bit for bit (`agreement.py`). One that cannot
        pay on this device is not measured, and not chosen.
        """
        path, choices = costs_path(model, batch), options(model, settings, batch)
        known, costs = read_costs(path), dict[Option, float]()
        measured, began = False, time.perf_counter()
        for option in sorted(choices, key=_order):
            if option.name not in known:
                if not _can_pay(option.plan, costs):
                    continue
                if not measured:
                    _tell_what_is_measured([other for other in choices if other.name not in known])
                seconds, measured = _measure(model, settings, prompt, batch, option), True
                if _is_hopeless(option.plan, seconds, costs):  # before it spares others: the device may have been busy
                    seconds = min(seconds, _measure(model, settings, prompt, batch, option))
                known[option.name] = seconds
                write_costs(path, known)
            costs[option] = known[option.name]
        if measured:
            _tell_what_was_measured(choices, costs, time.perf_counter() - began)
        return cls(model, {option: costs[option] for option in choices if option in costs})

    def begin(self) -> Option:
        """The option of the next generation."""
        worth = {option: self._worth(option) for option in self.costs}
        return self.choose(worth, [option for option in worth if option.plan.drafts])

    def go_on(self, option: Option) -> Option:
        """The option of the next stretch, of equal bits."""
        if not option.plan.drafts:
            return option
        return max(self.alternatives(option), key=self._worth)

    def note(self, plan: Plan, accept_lengths: Sequence[int], drafted: Sequence[int]) -> None:
        """Take in what the rounds of a generation by `plan` accepted, where `decode` did not run them."""
        self.follow(plan, [accept_lengths], [drafted])

    def alternatives(self, option: Option) -> list[Option]:
        """What a generation that began with `option` may go on with."""
        return [other for other in self.costs if other.width == option.width]

    def decode(self, state: DecodeState, knobs: Knobs, option: Option) -> DecodeState:
        """Rounds until every sequence is done, the first stretch by `option`; the state is donated.

        Stretches grow: each start of a program takes as long as a few rounds, and late choices change little.
        """
        program, until, read = (self.model.definition, self.model.decode_params), STRETCH, 0
        load_kernels(self.model, state, knobs, *(other.plan for other in self.alternatives(option)))
        while True:
            state = decode_rounds(*program, state, knobs._replace(until=jnp.int32(until)), option.plan)
            accepted, drafted, done, rounds = jax.device_get(
                (state.accept_lengths, state.drafted, state.done, state.rounds)
            )
            self.follow(option.plan, accepted[:, read:rounds], drafted[:, read:rounds])
            if np.all(done):
                return state
            option, until, read = self.go_on(option), 2 * until + STRETCH, int(rounds)

    def _worth(self, option: Option) -> float:
        return self.tokens(option.plan) / self.costs[option]


def options(
    model: LoadedModel,
    settings: DecodeConfig,
    batch: int,
    *,
    most_rows: int = MOST_ROUND_ROWS,
    trees: Sequence[int] = TREES,
) -> list[Option]:
    """Plain decoding, and plans of up to `draft_steps` drafts and `most_rows` rows of all sequences.

    Where a row's bits depend on how many there are, they are few, each as narrow as it can be, and none is a tree. Else
    all have room for the widest, for which a step drafter's first pass pays: large batches draft little anyway.
    """
    most = min(settings.draft_steps, model.max_drafts or MOST_DRAFTS)
    alike = rows_alike(batch * 2, model.config, model.manifest.dtype)
    if alike:
        most = min(most, max(most_rows // batch - 1, 1))
    drafts = [n for n in (DRAFTS if alike else FEW_DRAFTS) if n <= most]
    plans = [PLAIN, *(plan_for(n, drafts_blocks=model.drafts_blocks) for n in drafts)]
    for tree in (Plan("tree", rows) for rows in trees):
        if alike and tree.drafts <= most and batch * tree.rows <= most_rows:
            plans.append(tree)
    return [Option(plan, most + 1 if alike else plan.rows) for plan in plans]


def _order(option: Option) -> tuple[bool, int]:
    """Plain decoding, then plans of more drafts before those of fewer, which `_can_pay` may then spare."""
    return option.plan.drafts > 0, -option.plan.drafts


def _can_pay(plan: Plan, costs: Mapping[Option, float]) -> bool:
    """Whether the plan may be faster than plain decoding, by what is known of plain and of longer plans of its kind.

    Each further draft and row is taken to cost no more than the one before it. So where N drafts that are all right
    cost as much as the N + 1 plain tokens they give, fewer cost as much as theirs. Trees differ in rows and are free.
    """
    if plan.kind == "tree":
        return True
    longer = [other for other in costs if other.plan.kind == plan.kind and other.plan.drafts > plan.drafts]
    return not any(_is_hopeless(other.plan, costs[other], costs) for other in longer)


def _is_hopeless(plan: Plan, seconds: float, costs: Mapping[Option, float]) -> bool:
    """Whether a round takes as long as plain decoding of all that it could give."""
    plain = min((known for other, known in costs.items() if not other.plan.drafts), default=float("inf"))
    return plan.drafts > 0 and seconds >= (plan.drafts + 1) * plain


def _measure(model: LoadedModel, settings: DecodeConfig, prompt: Sequence[int], batch: int, option: Option) -> float:
    """Seconds of a round by an option, whose bits are those of plain decoding."""
    rounds, least = (ROUNDS, CPU_TOKENS) if jax.default_backend() == "cpu" else (MEASURED_ROUNDS, MEASURED_TOKENS)
    room = min(MEASURED_TOKENS, max(settings.max_new_tokens, least), model.config.context_length - len(prompt))
    own = replace(option.settings(settings), max_new_tokens=room)
    state = start(model, [list(prompt)] * batch, own, make_knobs(own, ()))
    if not option.plan.is_plains_program:
        require_equal_bits(model, state, option.plan)
    return round_seconds(model, state, option.plan, option.plan.drafts, rounds)[0]


def _tell_what_is_measured(choices: Sequence[Option]) -> None:
    plans = ", ".join(str(option.plan) for option in choices)
    notice(
        f"--plan auto measures once what rounds cost here ({plans}): for each some seconds to a minute, mostly of"
        " compiling; each is kept as soon as it is known"
    )


def _tell_what_was_measured(choices: Sequence[Option], costs: Mapping[Option, float], seconds: float) -> None:
    known = [f"{option.plan} {costs[option]:.3g}" for option in choices if option in costs]
    spared = [f"{option.plan} cannot pay here" for option in choices if option not in costs]
    notice(f"measured in {seconds:.0f} s, seconds of a round: {', '.join(known + spared)}")


def costs_path(model: LoadedModel, batch: int, *more: object) -> Path | None:
    """Where the costs of rounds are kept; None for a user without a home."""
    path = kept_path("plan_costs", model, os.cpu_count(), batch, *more)
    return path and path.with_suffix(".json")


def read_costs(path: Path | None) -> dict[str, float]:
    """What is kept there; nothing where it cannot be read."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(seconds) for name, seconds in found.items() if float(seconds) > 0}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_costs(path: Path | None, costs: Mapping[str, float]) -> None:
    """Keep the costs, if that is possible: they can be measured again."""
    if path is None:
        return
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(dict(costs)), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
