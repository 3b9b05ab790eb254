"""Stretches take about as long as streaming allows, whatever a round takes and starting one costs."""

import pytest

from dvi_jax.serve.pace import FEWEST, SHORT_SECONDS, DeviceTime, Pace
from dvi_jax.serve.requests import Request
from dvi_jax.serve.slots import MOST_ROUNDS


@pytest.mark.parametrize(
    ("round_seconds", "overhead", "expected"),
    [
        (0.001, 0.0, 16),
        (0.001, 0.013, 12),
        (0.0025, 0.005, 8),
        (0.007, 0.0, 4),
        (0.1, 0.0, FEWEST),
        (0.001, 0.2, FEWEST),
    ],
)
def test_a_stretch_settles_at_the_wanted_time(round_seconds, overhead, expected):
    """Where it may be neither longer nor shorter, rounds and overhead together are the time wanted."""
    now = 0.0
    pace = Pace(16, clock=lambda: now)
    for _ in range(60):
        rounds = pace.rounds(hurry=True)
        now += overhead + rounds * round_seconds
        pace.landed(rounds)
    assert abs(pace.rounds(hurry=True) - expected) <= 1
    if FEWEST < expected < 16:
        assert overhead + expected * round_seconds == pytest.approx(SHORT_SECONDS, rel=0.15)
    assert pace.rounds(hurry=False) == 16


def test_time_with_nothing_to_do_counts_for_nothing():
    now = 0.0
    pace = Pace(16, clock=lambda: now)
    assert pace.rounds(hurry=True) == FEWEST  # nothing is known
    pace.landed(4)
    now = 0.004
    pace.landed(4)
    assert pace.rounds(hurry=True) == 16
    pace.idle()
    now = 100.0
    pace.landed(4)
    assert pace.rounds(hurry=True) == 16


@pytest.mark.parametrize(
    ("host", "least", "expected"), [(0.0005, 1, 1), (0.0005, 8, 8), (0.004, 1, 6), (0.008, 4, 12), (0.1, 4, 16)]
)
def test_a_stretch_ahead_lasts_while_the_host_reads_the_last(host, least, expected):
    """Rounds of a millisecond: so many as take half as long again as the host's work, which goes on beside them."""
    now = 0.0
    pace = Pace(16, clock=lambda: now, ahead=True)
    for _ in range(100):
        rounds = pace.rounds(hurry=False, least=least)
        device = rounds * 0.001
        now += max(device, host)
        pace.landed(rounds, max(device - host, 0.0))
    assert abs(pace.rounds(hurry=False, least=least) - expected) <= 1


def test_a_device_whose_queue_is_full_is_not_a_slow_host():
    """Giving it programs then takes as long as it works, and stretches stay short."""
    now = 0.0

    def clock():
        return now

    pace, device, seen = Pace(16, clock, ahead=True), DeviceTime(clock), 0.0
    for _ in range(50):
        with device.handing():
            now += 0.01
        now += 0.001  # the host's own work
        pace.landed(4, device.seconds - seen)
        seen = device.seconds
    assert device.handed == device.seconds == pytest.approx(0.5)
    assert pace.rounds(hurry=False) == FEWEST


class BlockingLearner:
    """What it gives the device keeps it waiting for 50 ms, in every turn and with every reply."""

    branches = 0

    def __init__(self):
        self.now, self.turns = 0.0, 0

    def clock(self):
        """Each look at it takes 0.1 ms: the engine's own work."""
        self.now += 1e-4
        return self.now

    def take(self, ended, request):
        self.now += 0.05

    def has_work(self):
        return False

    def turn(self, status, *, idle, settle):
        self.now += 0.05
        self.turns += 1


def test_updates_that_wait_for_the_device_make_no_stretch_longer(model, make_engine, monkeypatch):
    """By an engine whose clock the learner moves."""
    monkeypatch.setattr("dvi_jax.serve.plans.piece_rounds", lambda *_: 2)
    learner = BlockingLearner()
    with make_engine(model, ahead=True, learner=learner) as engine:
        scheduler = engine._scheduler
        scheduler._pace, scheduler._device = Pace(MOST_ROUNDS, learner.clock, ahead=True), DeviceTime(learner.clock)
        replies = [engine.submit(Request((2, 3, index), 60, eos_ids=())) for index in range(2, 8)]
        assert [sum(len(piece.ids) for piece in reply) for reply in replies] == [60] * 6
        assert engine.drain(30)
        status = engine.status()
    assert status.stretches > 6
    assert status.slot_rounds == 4 * 2 * status.stretches
    # A look at the clock costs a little of what it measures.
    assert status.learner_seconds == pytest.approx(0.05 * learner.turns, rel=0.01)
    assert status.handed_seconds > 0.05 * len(replies)


def test_what_a_learner_waits_for_is_counted_once():
    now = 0.0

    def clock():
        return now

    device = DeviceTime(clock)
    with device.learning():
        now += 0.01
        with device.handing():  # as a reply that ends in a stretch that it waits for
            now += 0.02
        now += 0.03
    assert (device.learned, device.handed) == (pytest.approx(0.04), pytest.approx(0.02))
    assert device.seconds == pytest.approx(now)
