"""What the soak run concludes from its samples, and that a sample is of this process."""

from __future__ import annotations

import os
from dataclasses import replace

import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.soak import Sample, Sampler, draw, grown, slopes, step_drift

FLAT = [Sample(minute, 100 * minute, 300.0, 50, 2.0, 12, 8.0, 30) for minute in range(5, 15)]


def test_slopes():
    leaking = [replace(sample, resident_mib=300 + 2.5 * sample.minutes) for sample in FLAT]
    assert slopes(leaking)["resident_mib"] == pytest.approx(2.5)
    assert slopes(FLAT) == pytest.approx(dict.fromkeys(slopes(FLAT), 0.0), abs=1e-9)
    slower = [replace(sample, step_ms=8 + 0.1 * sample.minutes) for sample in FLAT]
    assert step_drift(slower) == pytest.approx(0.1 * 9 / (8 + 0.95))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda minute: {"resident_mib": 300 + 1.5 * minute}, "resident memory"),
        (lambda minute: {"step_ms": 8 - 0.1 * minute}, "step time"),
        (lambda minute: {"buffers": 50 + minute // 5}, "buffers"),
        (lambda minute: {"open_files": 12 + minute}, "open files"),
        (lambda minute: {"compiled": 30 + minute // 10}, "compiled"),
    ],
)
def test_what_grows_is_named(change, name):
    assert grown([replace(sample, **change(sample.minutes)) for sample in FLAT]) == [name]


def test_flat_is_flat():
    """Memory within its bound, and a save while a sample is taken, are no growth."""
    calm = [replace(sample, resident_mib=300 + 0.5 * sample.minutes) for sample in FLAT]
    assert grown([*calm[:7], replace(calm[7], buffers=90, open_files=14), *calm[8:]]) == []


def test_a_sample_is_of_this_process():
    sampler = Sampler(0, Console(quiet=True))
    held = jnp.zeros(2**18)
    with open(os.devnull, encoding="ascii"):
        sampler("train", {"step": 3, "rollout_seconds": 0.25, "update_seconds": 0.5})
    sampler("eval", {"step": 3})
    sampler.count_compilation("/jax/core/compile/backend_compile_duration", 0.1)
    sampler("train", {"step": 4, "rollout_seconds": 0.5, "update_seconds": 0.5})
    first, second = sampler.samples
    assert (first.updates, first.step_ms, first.compiled, second.step_ms, second.compiled) == (3, 750, 0, 1000, 1)
    assert first.open_files == second.open_files + 1
    assert first.buffers_mib >= held.nbytes / 2**20 == 1
    assert 50 < first.resident_mib < 100_000


def test_picture(tmp_path):
    draw(FLAT, 7.0, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
