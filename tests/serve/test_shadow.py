"""When a drafter on trial is found worse, and how much time learning takes: of counts and clocks alone."""

import numpy as np
import pytest

from dvi_jax.serve.shadow import BLOCK, ENOUGH, LEAST, Shadow, Verdict
from dvi_jax.serve.share import MOST_SAVED, Share


class Traffic:
    """An engine's counters, as drafts are judged `stretch` at a time."""

    def __init__(self, seed=0, stretch=40):
        self.rng, self.stretch, self.judged, self.accepted = np.random.default_rng(seed), stretch, 0, 0

    def run(self, shadow, rate, drafts, spread=0.0, plan="chain:1"):
        """Until a verdict, or so many drafts; the rate of a stretch differs by `spread` from that of another."""
        for _ in range(drafts // self.stretch):
            if shadow.verdict() is not Verdict.OPEN:
                break
            self.judged += self.stretch
            p = np.clip(rate + spread * self.rng.normal(), 0, 1)
            self.accepted += self.rng.binomial(self.stretch, p)
            shadow.observe(self.judged, self.accepted, plan)
        return shadow.verdict()


def on_trial(before, after, *, seed, spread=0.0):
    """What is said of a drafter of rate `after` once one of rate `before` was known."""
    shadow, traffic = Shadow(), Traffic(seed)
    assert traffic.run(shadow, before, 4000, spread) is Verdict.OPEN
    shadow.swapped(traffic.judged, traffic.accepted)
    verdict = traffic.run(shadow, after, 10_000, spread)
    return verdict, traffic.judged - 4000


def test_a_worse_drafter_is_found_out_and_chance_is_not():
    worse = [on_trial(0.5, 0.25, seed=seed) for seed in range(100)]
    assert sum(verdict is Verdict.WORSE for verdict, _ in worse) >= 99
    assert np.mean([drafts for _, drafts in worse]) < 2 * LEAST * 120
    for spread in (0.0, 0.1):  # single drafts vary so little that 0.1 would be 6 standard errors of a whole trial
        same = [on_trial(0.5, 0.5, seed=seed, spread=spread) for seed in range(150)]
        assert sum(verdict is Verdict.WORSE for verdict, _ in same) <= 3
        assert all(drafts <= ENOUGH * (BLOCK + 40) for _, drafts in same)
    assert {on_trial(0.3, 0.6, seed=seed)[0] for seed in range(50)} == {Verdict.HELD}
    assert on_trial(0.4, 0.0, seed=0)[0] is Verdict.WORSE


def test_an_endless_trial_is_judged_by_its_newest_drafts():
    """As where learning has stopped, or has no time: nothing grows with what is served."""
    shadow, last = Shadow(), 100 * ENOUGH
    shadow.swapped(0, 0)
    for block in range(1, last + 1):
        shadow.observe(BLOCK * block, BLOCK * max(block - last + 2 * ENOUGH, 0), "chain:1")
    assert shadow.rates[1] == 1.0


def test_a_plan_is_compared_with_itself():
    """A tree is right more often than a chain: a drafter is not worse for the chain's rate, nor known by it.

    A worse one may be the reason why rounds draft by a chain now, so that such a trial stays open.
    """
    shadow, traffic = Shadow(), Traffic()
    traffic.run(shadow, 0.7, 4000, plan="tree:4")
    shadow.swapped(traffic.judged, traffic.accepted)
    traffic.run(shadow, 0.3, 3 * 120, plan="tree:4")
    assert traffic.run(shadow, 0.45, 10_000, plan="chain:1") is Verdict.OPEN
    assert traffic.run(shadow, 0.3, 400, plan="tree:4") is Verdict.WORSE
    shadow.hold()
    shadow.swapped(traffic.judged, traffic.accepted)
    assert traffic.run(shadow, 0.45, 10_000, plan="chain:1") is Verdict.HELD
    assert shadow.rates == pytest.approx((0.45, 0.45), abs=0.1)


def test_a_block_of_two_plans_says_nothing():
    """Nor does the first that was begun with the plan before: what it counts may be of either. A trial begins anew."""
    shadow, found = Shadow(), []
    for look, plan in enumerate(["chain:1"] * 4 + ["tree:4"] * 4 + ["chain:1", "tree:4"] * 4, 1):
        shadow.observe(BLOCK * look // 2, 0, plan)
        found.append({plan: len(rates) for plan, rates in shadow._good.items()})
    assert found[3] == {"chain:1": 2}
    assert found[7:] == [{"chain:1": 2, "tree:4": 1}] * 9
    judged = BLOCK * look // 2
    shadow.observe(judged + 1, 0, "chain:1")
    shadow.swapped(judged + 1, 0)
    shadow.observe(judged + 1 + BLOCK, BLOCK, "chain:1")
    assert shadow.rates == (0.0, 1.0)


def test_the_next_is_measured_by_what_held():
    shadow, traffic = Shadow(), Traffic()
    shadow.swapped(0, 0)
    assert traffic.run(shadow, 0.6, 10_000) is Verdict.HELD  # there was nothing to compare with
    shadow.hold()
    shadow.swapped(traffic.judged, traffic.accepted)
    assert traffic.run(shadow, 0.2, 10_000) is Verdict.WORSE
    shadow.take_back(traffic.judged, traffic.accepted)
    assert not shadow.on_trial
    assert shadow.rates[0] == pytest.approx(0.6, abs=0.1)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_share_is_kept():
    """Pieces of any length, asked for at any moment: at most the share of the time, and one piece."""
    clock, rng = Clock(), np.random.default_rng(0)
    share, longest = Share(0.1, clock), 0.0
    for _ in range(3000):
        clock.now += rng.exponential(0.02)  # a stretch
        if share.allows():
            piece = rng.uniform(0.01, 0.05)
            clock.now += piece
            share.spend(piece, free=False)
            longest = max(longest, piece)
    elapsed = clock.now - 100.0
    assert elapsed > 60
    assert 0.09 * elapsed < share.spent <= 0.1 * elapsed + longest


def test_quiet_times_are_free_and_save_up_little():
    clock = Clock()
    share = Share(0.1, clock)
    for _ in range(100):
        clock.now += 0.05
        share.spend(0.05, free=True)
    assert share.spent == pytest.approx(5.0)
    assert share.allows()
    clock.now += 3600
    spent = 0.0
    while share.allows():
        share.spend(0.02, free=False)
        spent += 0.02
    assert spent <= MOST_SAVED + 0.021
