"""Stretches take about as long as streaming allows, whatever a round takes and starting one costs."""

import pytest

from dvi_jax.serve.pace import FEWEST, SHORT_SECONDS, DeviceTime, Pace


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


@pytest.mark.parametrize(("host", "expected"), [(0.0005, FEWEST), (0.004, 6), (0.008, 12), (0.1, 16)])
def test_a_stretch_ahead_lasts_while_the_host_reads_the_last(host, expected):
    """Rounds of a millisecond: so many as take half as long again as the host's work, which goes on beside them."""
    now = 0.0
    pace = Pace(16, clock=lambda: now, ahead=True)
    for _ in range(100):
        rounds = pace.rounds(hurry=False)
        device = rounds * 0.001
        now += max(device, host)
        pace.landed(rounds, max(device - host, 0.0))
    assert abs(pace.rounds(hurry=False) - expected) <= 1


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
