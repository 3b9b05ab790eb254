"""Which plan is chosen: rates and costs worked by hand, and generations that come out the same whatever is chosen."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode import choosing
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.choosing import Acceptance, PlanChooser, options
from dvi_jax.decode.plan import PLAIN, Option, Plan
from dvi_jax.presets import SHAPES

pytestmark = pytest.mark.optimized
WIDTH = 5
CHAINS = {n: Option(Plan("chain", n), WIDTH) for n in (1, 2, 4)}
NOTHING = Option(PLAIN, WIDTH)
SETTINGS = DecodeConfig(draft_steps=4, max_new_tokens=40)


def chooser(costs, model=None):
    return PlanChooser(model, costs)


def test_expected_tokens_by_hand():
    acceptance = Acceptance()
    assert acceptance.tokens(0) == 1
    assert acceptance.tokens(2) == pytest.approx(1 + 0.45 + 0.45**2)  # the prior alone
    acceptance.add([1], [2])  # one draft judged, and wrong
    first = (0 + 2 * 0.45) / (1 + 2)
    assert acceptance.tokens(1) == pytest.approx(1 + first)
    acceptance.add([3, 5, 1], [2, 0, 0])  # both right; rounds that draft nothing do not count
    faded = choosing.MEMORY
    first = (1 + 2 * 0.45) / (faded + 1 + 2)
    second = (1 + 2 * first) / (1 + 2)
    assert acceptance.tokens(2) == pytest.approx(1 + first + first * second)


def test_rates_come_to_what_they_are():
    rng, acceptance = np.random.default_rng(0), Acceptance()
    right = rng.random((4000, 4)) < [0.8, 0.5, 0.5, 0.2]
    lengths = 1 + np.cumprod(right, axis=1).sum(axis=1)
    acceptance.add(lengths, np.full(4000, 4))
    assert acceptance.tokens(4) == pytest.approx(1 + 0.8 + 0.4 + 0.2 + 0.04, abs=0.15)


@pytest.mark.parametrize(
    ("accept_length", "expected"), [(1, NOTHING), (2, CHAINS[1]), (5, CHAINS[4])], ids=["none", "one", "all"]
)
def test_the_plan_that_pays_is_chosen(accept_length, expected):
    """Drafts at a tenth of a round each: none right, the first alone, all."""
    one = chooser({NOTHING: 1.0, CHAINS[1]: 1.1, CHAINS[2]: 1.2, CHAINS[4]: 1.4})
    one.acceptance.add([accept_length] * 200, [4] * 200)
    assert one.begin() == expected
    assert one.go_on(CHAINS[2]) == expected


def test_a_generation_that_drafts_nothing_stays_so_and_a_later_one_tries_again():
    one = chooser({NOTHING: 1.0, CHAINS[1]: 1.03, CHAINS[4]: 1.4})
    one.acceptance.add([1] * 200, [4] * 200)
    assert one.go_on(NOTHING) == NOTHING
    begun = [one.begin() for _ in range(2 * choosing.RETRY)]
    assert [n for n, option in enumerate(begun, 1) if option != NOTHING] == [choosing.RETRY, 2 * choosing.RETRY]


def test_trying_again_is_the_rarer_the_more_it_costs():
    """A round with a draft costs two and gives one token: it loses about its own time, so one in 200 may try."""
    one = chooser({NOTHING: 1.0, CHAINS[1]: 2.0})
    one.acceptance.add([1] * 1000, [1] * 1000)
    begun = [one.begin() for _ in range(400)]
    tries = [n for n, option in enumerate(begun, 1) if option != NOTHING]
    assert len(tries) == 2
    assert 194 <= tries[0] <= 200


def test_what_there_is_to_choose_from(make_tiny, monkeypatch):
    model = make_tiny(layers=2)
    assert options(model, SETTINGS, 1)[:2] == [Option(PLAIN, 1), Option(Plan("early-exit", 1), 2)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert options(model, SETTINGS, 1)[0] == Option(PLAIN, 1)  # heads of 8: attention has no kernel for them
    half = replace(model, config=SHAPES["smollm2"], manifest=replace(model.manifest, dtype="bfloat16"))
    chains, trees = [Plan("chain", n) for n in (1, 2, 3)], [Plan("tree", rows) for rows in (8, 16, 32)]
    assert options(half, SETTINGS, 1) == [Option(plan, 5) for plan in (PLAIN, *chains, *trees)]
    two = replace(SETTINGS, draft_steps=2)
    assert options(half, two, 8)[-1] == Option(Plan("tree", 8), 3)  # 64 rows in all
    assert options(half, two, 16)[-1] == Option(Plan("chain", 2), 3)
    assert options(half, two, 33) == [Option(PLAIN, 2), Option(Plan("chain", 1), 2)]


def test_a_tree_is_taken_to_be_better_than_a_chain_until_it_is_known():
    """Two drafts right in half of all cases: a tree may be tried, and is then judged."""
    chain, tree = CHAINS[2], Option(Plan("tree", 8), WIDTH)
    one = chooser({NOTHING: 1.0, chain: 1.2, tree: 1.35})
    one.acceptance.add([1, 3] * 500, [2] * 1000)  # the second draft is right whenever the first is
    one.acceptance.add([2] * 400, [2] * 400)
    assert one.begin() == tree
    one.trees[tree.plan].add([1] * 200, [2] * 200)
    assert one.begin() == chain


def test_output_is_the_same_whatever_is_chosen(make_tiny, monkeypatch):
    """Plans change from stretch to stretch; the ids are those of plain decoding of the same width."""
    monkeypatch.setattr(choosing, "STRETCH", 6)
    model, settings = make_tiny(layers=2), DecodeConfig(draft_steps=3, max_new_tokens=40)
    costs = {Option(Plan("early-exit", n), 4): 1 + 0.3 * n for n in (1, 3)}
    one, seen = chooser(costs, model), []
    original = one.go_on

    def changing(option):
        original(option)
        seen.append(list(costs)[len(seen) % 2])
        return seen[-1]

    one.go_on = changing
    prompts = [[5, 9, 2], [7, 7]]
    plain, _ = generate_batch(model, prompts, settings, plain=True, eos_ids=())
    found, _ = generate_batch(model, prompts, settings, eos_ids=(), chooser=one)
    assert [row.output_ids for row in found] == [row.output_ids for row in plain]
    assert len(seen) >= 2
    rounds = sum(drafted > 0 for row in found for drafted in row.drafted)
    assert one.acceptance.judged[0] == pytest.approx((1 - choosing.MEMORY**rounds) / (1 - choosing.MEMORY), rel=0.02)


@pytest.fixture
def measuring(make_tiny, monkeypatch, tmp_path):
    """What measures plans of up to three drafts, and the plans that were; rounds cost what a mapping says."""
    monkeypatch.setenv("DVI_JAX_CACHE", str(tmp_path))
    calls, seconds = [], {"plain": 1.0, "early-exit:1": 1.2, "early-exit:3": 3.9}

    def round_seconds(model, state, plan, drafts, rounds):
        calls.append(str(plan))
        return seconds[str(plan)], float(drafts)

    monkeypatch.setattr(choosing, "round_seconds", round_seconds)
    settings = DecodeConfig(draft_steps=3)
    return lambda: PlanChooser.measured(make_tiny(layers=2), settings, [1, 2]), calls, seconds


def test_costs_are_measured_once(measuring, tmp_path, capsys):
    measure, calls, seconds = measuring
    first = measure()
    assert calls == ["plain", "early-exit:3", "early-exit:1"]
    assert "early-exit:1 1.2" in capsys.readouterr().err
    assert measure().costs == first.costs
    assert {str(option.plan): cost for option, cost in first.costs.items()} == seconds
    assert capsys.readouterr().err == ""
    assert len(calls) == 3
    (kept,) = (tmp_path / "plan_costs").iterdir()
    kept.write_text("{broken", encoding="utf-8")
    measure()
    assert len(calls) == 6


def test_fewer_drafts_are_not_measured_where_more_cannot_pay(measuring, capsys):
    """Four tokens at the price of four plain ones: a draft fewer saves less than the token it gives."""
    measure, calls, seconds = measuring
    seconds["early-exit:3"] = 4.0
    assert [str(option.plan) for option in measure().costs] == ["plain", "early-exit:3"]
    assert calls == ["plain", "early-exit:3", "early-exit:3"]
    assert "early-exit:1 cannot pay here" in capsys.readouterr().err
    assert measure().begin().plan == PLAIN
    assert capsys.readouterr().err == ""
    assert len(calls) == 3


def test_a_busy_moment_spares_no_plan(measuring, monkeypatch):
    """A cost that would is measured again, and the smaller one counts."""
    measure, calls, seconds = measuring
    usual, found = choosing.round_seconds, iter([1.0, 40.0, 3.9, 1.2])
    monkeypatch.setattr(choosing, "round_seconds", lambda *given: (usual(*given), (next(found), 0.0))[1])
    assert {str(option.plan): cost for option, cost in measure().costs.items()} == seconds
    assert calls == ["plain", "early-exit:3", "early-exit:3", "early-exit:1"]


def test_what_was_measured_before_a_stop_is_kept(measuring):
    measure, calls, seconds = measuring
    cost = seconds.pop("early-exit:1")
    with pytest.raises(KeyError):
        measure()
    seconds["early-exit:1"] = cost
    measure()
    assert calls == ["plain", "early-exit:3", "early-exit:1", "early-exit:1"]
