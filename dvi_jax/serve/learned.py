"""What an engine has learned so far, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Learned:
    """What has been learned so far; a restart goes on from what its snapshot knew."""

    updates: int = 0
    swaps: int = 0  # times that other weights became live, those taken back included
    rollbacks: int = 0
    learned_positions: int = 0  # that updates looked at
    windows: int = 0  # replies that were kept: learned from, or ready to be
    seconds: float = 0.0  # of learning, windows that were kept for it included
    update_seconds: float = 0.0  # an update of all drafts, of a device that does nothing else
    agreement: float = 0.0  # share of its positions where the drafter's first choice was the verifier's
    digest: str = ""  # checksum of the live drafter's weights, 8 hexadecimal digits
    live_since: float = 0.0  # unix seconds
    state: str = "learning"  # or why no more
