"""How an engine drafts: by what is accepted and what rounds cost, and without a change to any reply."""

import itertools
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.errors import UserError
from dvi_jax.presets import SHAPES
from dvi_jax.serve import engine as engine_module
from dvi_jax.serve import plans as plans_module
from dvi_jax.serve.plans import PIECES, START, BestPlan, OnePlan, choose, piece_rounds, plans_of, round_seconds
from dvi_jax.serve.requests import Request
from dvi_jax.serve.slots import Shape, empty_slots, run_stretch

COSTS = {PLAIN: 1.0, Plan("chain", 1): 1.2, Plan("chain", 3): 1.6, Plan("chain", 5): 2.0}


def run_stretches(choice, rate, stretches, rng, slots=4, rounds=4):
    """Rounds of sequences whose every draft is right with probability `rate(plan)`; which plans were chosen."""
    chosen = []
    for _ in range(stretches):
        plan = choice.next_plan(fresh=True)
        chosen.append(plan)
        right = rng.random((slots, rounds, plan.drafts)) < (rate(plan) if callable(rate) else rate)
        accepted = np.cumprod(right, axis=2).sum(axis=2) + 1
        if plan.drafts:
            choice.add(plan, accepted, np.full((slots, rounds), plan.drafts), np.ones(slots, bool))
    return chosen


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
def test_the_plan_of_most_tokens_a_second(rate):
    """Against the expected accept length of a chain, (1 - r^(n+1)) / (1 - r)."""
    choice = BestPlan(COSTS, width=6)
    tokens = {plan: (1 - rate ** (plan.drafts + 1)) / (1 - rate) for plan in COSTS}
    best = max(COSTS, key=lambda plan: tokens[plan] / COSTS[plan])
    assert best.drafts == {0.1: 0, 0.5: 1, 0.95: 5}[rate]
    run_stretches(choice, rate, 300, np.random.default_rng(0))
    chosen = run_stretches(choice, rate, 1000, np.random.default_rng(1))
    speed = sum(tokens[plan] for plan in chosen) / sum(COSTS[plan] for plan in chosen)
    assert speed > 0.985 * tokens[best] / COSTS[best]
    assert max(COSTS, key=chosen.count) == best
    assert choice.gain == pytest.approx(tokens[best] / COSTS[best] - 1, abs=0.05)


def test_drafts_in_vain_cost_half_a_percent():
    """And drafting comes back when drafts are right again, or not where the drafter has missed rows everywhere."""
    choice, rng = BestPlan(COSTS, width=6), np.random.default_rng(0)
    run_stretches(choice, 0.0, 200, rng)
    chosen = run_stretches(choice, 0.0, 800, rng)
    lost = sum(COSTS[plan] - 1 for plan in chosen) / sum(COSTS[plan] for plan in chosen)  # of the time
    assert 0 < lost <= 0.006
    assert {choice.next_plan(fresh=False) for _ in range(1000)} == {PLAIN}
    run_stretches(choice, 0.95, 1500, rng)
    assert choice.plan == Plan("chain", 5)


@pytest.mark.parametrize(("of_fresh", "of_others", "drafts"), [(0.05, 0.5, 1), (0.5, 0.0, 1), (0.05, 0.1, 0)])
def test_what_is_tried_is_worth_what_the_better_sequences_say(of_fresh, of_others, drafts):
    """One of four has just begun, where drafts are right less often; of the others the drafter has missed rows."""
    choice, rng = BestPlan(COSTS, width=6), np.random.default_rng(0)
    fresh, chosen = np.arange(4) == 0, []
    for _ in range(600):
        plan = choice.next_plan(fresh=True)
        chosen.append(plan)
        right = rng.random((4, 4, plan.drafts)) < np.where(fresh, of_fresh, of_others)[:, None, None]
        accepted = np.cumprod(right, axis=2).sum(axis=2) + 1
        if plan.drafts:
            choice.add(plan, accepted, np.full((4, 4), plan.drafts), fresh)
    assert max(COSTS, key=chosen[-300:].count).drafts == drafts


def test_many_slots_say_more():
    """Of sixteen, drafts that pay for a little more than they cost are kept to: chance changes the plan far less."""
    costs, changes = {PLAIN: 1.0, Plan("chain", 1): 1.25}, []
    for slots in (1, 16):  # as if they were one sequence, or as they are
        choice, rng = BestPlan(costs, width=2, slots=slots), np.random.default_rng(0)
        run_stretches(choice, 0.29, 50, rng, slots=16, rounds=8)
        chosen = run_stretches(choice, 0.29, 1000, rng, slots=16, rounds=8)
        changes.append(sum(one != other for one, other in itertools.pairwise(chosen)))
    assert 10 * changes[1] < changes[0]
    assert chosen.count(Plan("chain", 1)) > 950


def test_rounds_of_a_sequence_that_is_done_count_for_nothing():
    """The first of two ended after a round; its zeros are not drafts that were wrong."""
    choice, plan, drafted = BestPlan(COSTS, width=6), Plan("chain", 1), np.ones((2, 3), int)
    for _ in range(200):
        choice.add(plan, np.array([[2, 0, 0], [2, 2, 2]]), drafted, np.ones(2, bool))
    assert choice.acceptance.rates()[0] > 0.99
    choice.add(plan, np.array([[1, 0, 0], [2, 2, 2]]), drafted, np.array([True, False]))
    assert choice.acceptance.rates()[0] < choice._of_all.acceptance.rates()[0]


def test_rounds_behind_the_end_of_replies_give_nothing():
    """Drafts bring 1.4 tokens for 1.3 of the time: too little where 88 of 100 rounds are of use, and 97 else."""
    plan = Plan("chain", 1)
    choice, rng = BestPlan({PLAIN: 1.0, plan: 1.3}, width=2, slots=16), np.random.default_rng(0)
    for others_used, best in ((97, plan), (88, PLAIN), (97, plan)):
        for _ in range(400):
            choice.count(PLAIN, 97, 100)
            choice.count(plan, others_used, 100)
            choice.add(plan, 1 + (rng.random((1, 8)) < 0.4), np.ones((1, 8), int), np.ones(1, bool))
        chosen = [choice.next_plan(fresh=False) for _ in range(20)]
        assert chosen == [best] * 20
        assert choice.gain == pytest.approx(max(1.4 / 1.3 * others_used / 97 - 1, 0), abs=0.04)


def test_what_is_not_known_of_a_plan_is_taken_from_others():
    """Of two that draft one loses every fourth round; of the other and of plain decoding nothing is known."""
    one, other = Plan("chain", 1), Plan("chain", 5)
    choice = BestPlan({PLAIN: 1.0, one: 1.3, other: 2.0}, width=6, slots=4)
    before = {plan: choice._worth(plan) for plan in choice.plans}
    for _ in range(1000):
        choice.count(one, 3, 4)
    after = {plan: choice._worth(plan) / worth for plan, worth in before.items()}
    assert after[PLAIN] == 1
    assert after[one] == pytest.approx(0.75, abs=0.01)
    assert after[other] == pytest.approx(0.75, abs=0.02)
    for _ in range(1000):
        choice.count(other, 4, 4)
    assert choice._worth(other) / before[other] == pytest.approx(1, abs=0.02)
    assert choice._worth(one) / before[one] == pytest.approx(0.75, abs=0.01)


def test_who_was_decoded_plainly_is_fresh_no_more(model, make_engine, pieces_of, monkeypatch):
    """One reply goes on while another comes: of the first the drafter has missed rows since rounds drafted nothing."""
    begun, asked, seen = threading.Event(), threading.Event(), []

    class Told(OnePlan):
        def next_plan(self, *, fresh):
            if len(seen) == 2:
                begun.set()
                assert asked.wait(10)
            self.plan = PLAIN if len(seen) == 1 else Plan("chain", 2)
            seen.append(fresh)
            return self.plan

        def add(self, plan, accept_lengths, drafted, fresh):
            found.append((accept_lengths.shape[0], fresh.tolist()))

    found, choice = [], Told(PLAIN, 3)
    choice.pieces = {PLAIN: 0, Plan("chain", 2): 0}
    monkeypatch.setattr(engine_module, "choose", lambda model, plans, width, slots, **_: (choice, slots))
    with make_engine(model) as engine:
        long = engine.submit(Request((5, 9, 7), 80, eos_ids=()))
        assert begun.wait(10)
        short = engine.submit(Request((8, 9, 7), 9, eos_ids=()))
        asked.set()
        pieces_of(short)
        pieces_of(long)
    assert found[0] == (1, [True])
    assert (1, [False]) in found
    assert any(sorted(fresh) == [False, True] for _, fresh in found)


def test_a_drafter_that_becomes_better_is_drafted_with_more():
    """Of its first drafts none was right, of any plan; later the best is by far a tree, then a long chain."""
    tree = Plan("tree", 8)
    choice, rng = BestPlan(COSTS | {tree: 1.3}, width=6), np.random.default_rng(0)
    chosen = run_stretches(choice, 0.0, 300, rng)
    assert {tree, PLAIN} <= set(chosen)
    tokens = {plan: (1 - 0.5 ** (plan.drafts + 1)) / 0.5 for plan in COSTS} | {tree: 1 + 0.7 + 0.7 * 0.7}
    assert max(tokens, key=lambda plan: tokens[plan] / choice.costs[plan]) == tree
    later = run_stretches(choice, lambda plan: 0.7 if plan == tree else 0.5, 900, rng)
    assert later[-300:].count(tree) > 250
    del choice.costs[tree]
    choice.plans = tuple(COSTS)
    run_stretches(choice, 0.95, 100, rng)
    assert choice.plan == Plan("chain", 5)


def test_changes_of_plan_change_no_reply(model, make_engine, pieces_of, monkeypatch):
    class Alternating(OnePlan):
        def next_plan(self, *, fresh):
            self.plan = Plan("chain", 2) if self.plan == PLAIN else PLAIN
            return self.plan

    requests = [Request((index, 9, index), 30, eos_ids=()) for index in range(2, 8)]
    with make_engine(model) as engine:
        expected = [pieces_of(engine.submit(request)) for request in requests]
    choice = Alternating(PLAIN, 3)
    choice.pieces = {PLAIN: 0, Plan("chain", 2): 0}
    monkeypatch.setattr(engine_module, "choose", lambda model, plans, width, slots, **_: (choice, slots))
    with make_engine(model) as engine:
        handles = [engine.submit(request) for request in requests]
        assert [pieces_of(handle) for handle in handles] == expected
    assert all(handle.statistics.drafted > 0 for handle in handles)
    assert any(handle.statistics.drafted < 2 * handle.statistics.rounds - 4 for handle in handles)


@pytest.mark.parametrize("ahead", [False, True])
def test_costs_are_measured_once(model, monkeypatch, tmp_path, ahead):
    """In slots that are free before and after, and kept on disk; what is started ahead has pieces by them."""
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path))
    plans = (PLAIN, Plan("chain", 2))
    empty = empty_slots(model.definition, model.decode_params, Shape(4, 128, 3, True))
    choice, empty = choose(model, plans, 3, empty, ahead=ahead)
    assert choice.costs.keys() == set(plans)
    assert all(seconds > 0 for seconds in choice.costs.values())
    assert np.all(empty.decode.done)
    monkeypatch.setattr("dvi_jax.serve.plans.round_seconds", pytest.fail)
    again, empty = choose(model, plans, 3, empty, ahead=ahead)
    assert again.costs == choice.costs
    assert again.pieces == choice.pieces
    assert set(choice.pieces.values()) <= (set(PIECES) if ahead else {0})
    alone, _ = choose(model, plans[1:], 3, empty, ahead=ahead)
    assert alone.pieces == {plans[1]: choice.pieces[plans[1]]}


def test_pieces_are_those_of_the_first_process(model, monkeypatch):
    """All run them together: what each has measured for itself may lie on either side of a boundary."""
    costs = {PLAIN: 0.0001, Plan("chain", 2): 0.1}
    first = {str(plan): seconds for plan, seconds in costs.items()} | {START: 0.001}
    empty = empty_slots(model.definition, model.decode_params, Shape(4, 128, 3, True))
    monkeypatch.setattr("dvi_jax.serve.plans.read_costs", lambda path: {})
    monkeypatch.setattr(
        "dvi_jax.serve.plans.round_seconds",
        lambda model, slots, plans, piece: (dict.fromkeys(plans, 0.001), 0.1, slots),
    )
    monkeypatch.setattr("dvi_jax.serve.plans.told", lambda make: first)
    choice, _ = choose(model, tuple(costs), 3, empty, ahead=True)
    assert choice.costs == costs
    assert choice.pieces == {PLAIN: 8, Plan("chain", 2): 1}


def test_a_user_without_a_home_may_serve(model, make_engine, pieces_of, monkeypatch):
    """What was measured is kept nowhere, and measured again."""
    monkeypatch.delenv("DVI_JAX_CACHE")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    for plan in ("chain:2", "auto"):
        with make_engine(model, plan=plan, ahead=True) as engine:
            assert len(pieces_of(engine.submit(Request((5, 9), 4, eos_ids=())))[0]) == 4


@pytest.mark.parametrize(
    ("milliseconds", "starting", "rounds"),
    [(0.73, 1.3, 8), (0.9, 1.3, 8), (1.43, 1.3, 4), (1.02, 1.0, 4), (5.0, 1.3, 1)],
)
def test_a_piece_takes_the_device_longer_than_the_host(milliseconds, starting, rounds):
    """By what was quickest beside an H100: SmolLM2 in 16 slots plainly, by chain:1, tree:8, in 8 by chain:3; 7B."""
    assert piece_rounds(milliseconds / 1000, starting / 1000) == rounds
    assert piece_rounds(1e-6, starting / 1000) == 8


def test_what_starting_a_piece_takes_is_measured(model, monkeypatch):
    """By a clock that starting one moves by a millisecond, and waiting for the device by a hundred for each since."""
    now, under_way = [0.0], []

    def started(*given, **named):
        now[0] += 0.001
        under_way.append(None)
        return run_stretch(*given, **named)

    def waited(tree):
        now[0] += 0.1 * len(under_way)
        under_way.clear()
        return tree

    empty = empty_slots(model.definition, model.decode_params, Shape(4, 128, 3, True))
    monkeypatch.setattr(plans_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(plans_module, "run_stretch", started)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    costs, starting, _ = round_seconds(model, empty, (PLAIN,), piece=8)
    assert starting == pytest.approx(0.001)
    assert costs[PLAIN] == pytest.approx(0.101 / 8)


def test_costs_without_what_the_host_takes_are_measured_anew(model, monkeypatch, tmp_path):
    """As an earlier release kept them. Where stretches are not started ahead they are all that is needed."""
    path, plans = tmp_path / "costs.json", (PLAIN, Plan("chain", 2))
    path.write_text(json.dumps({"plain": 500.0, "chain:2": 600.0, "tree:8": 900.0}))
    monkeypatch.setattr(plans_module, "costs_path", lambda *_: path)
    empty = empty_slots(model.definition, model.decode_params, Shape(4, 128, 3, True))
    choice, empty = choose(model, plans, 3, empty)
    assert choice.costs == {PLAIN: 500.0, plans[1]: 600.0}
    choice, _ = choose(model, plans, 3, empty, ahead=True)
    assert max(choice.costs.values()) < 500
    known = json.loads(path.read_text())
    assert known.keys() == {"plain", "chain:2", "tree:8", START}
    assert known["tree:8"] == 900


def test_tries_are_rare_though_they_may_cost_little():
    choice = BestPlan({PLAIN: 1.0, Plan("chain", 1): 1.5}, width=2)
    choice.add(Plan("chain", 1), np.full((1, 1000), 1), np.ones((1, 1000), int), np.ones(1, bool))
    choice.costs[Plan("chain", 1)] = 1.01
    retry = plans_module.RETRY
    chosen = run_stretches(choice, 0.0, 3 * retry, np.random.default_rng(0), slots=1)
    assert [number for number, plan in enumerate(chosen, 1) if plan.drafts] == [retry, 2 * retry, 3 * retry]


def test_plans_of_a_name(model, monkeypatch):
    plans, width = plans_of(model, "auto", 4)
    assert (plans[0], width) == (PLAIN, max(plan.drafts for plan in plans) + 1)
    assert plans_of(model, "auto", 1000) == ((PLAIN,), 1)
    assert plans_of(model, "chain:2", 4) == ((Plan("chain", 2),), 3)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = replace(model, config=SHAPES["smollm2"], manifest=replace(model.manifest, dtype="bfloat16"))
    chains, trees = [Plan("chain", drafts) for drafts in (1, 2, 3, 5)], [Plan("tree", rows) for rows in (4, 8, 16)]
    assert plans_of(half, "auto", 8) == ((PLAIN, *chains, *trees), 6)
    assert plans_of(half, "auto", 16) == ((PLAIN, *chains, *trees), 6)  # up to 256 rows in all
    assert plans_of(half, "auto", 64) == ((PLAIN, *chains[:3], trees[0]), 4)
    with pytest.raises(UserError, match="plan tree:8: 33 such trees have more than 256 rows"):
        plans_of(half, "tree:8", 33)
    assert plans_of(half, "auto", 128) == ((PLAIN, chains[0]), 2)
    assert plans_of(half, "auto", 129) == ((PLAIN,), 1)
    with pytest.raises(UserError, match="drafter kangaroo takes"):
        plans_of(model, "block:2", 4)
