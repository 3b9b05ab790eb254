"""What stretches of rounds have come to, in the engine's status."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from dvi_jax.serve.requests import EngineStatus


def counted(status: EngineStatus, accept_lengths: np.ndarray, drafted: np.ndarray, most: int) -> EngineStatus:
    """`status` after one more stretch: rounds [slots, rounds] that drafted at most `most` tokens each."""
    place, real = np.arange(most), accept_lengths > 0
    judged = real[..., None] & (place < drafted[..., None]) & (place < accept_lengths[..., None])
    accepted = judged & (place < accept_lengths[..., None] - 1)

    def added(counts: tuple[int, ...], new: np.ndarray) -> tuple[int, ...]:
        sums = new.sum(axis=(0, 1)).tolist()
        return tuple(old + more for old, more in zip(counts or [0] * most, sums, strict=True))

    return replace(
        status,
        stretches=status.stretches + 1,
        rounds=status.rounds + int(real.sum()),
        slot_rounds=status.slot_rounds + status.slots * real.shape[1],
        judged=added(status.judged, judged),
        accepted=added(status.accepted, accepted),
        last_stretch=time.monotonic(),
    )
