"""How an engine learns from what it serves."""

from __future__ import annotations

from dataclasses import dataclass, field

from dvi_jax.config import MATRICES, MOST_BRANCHES, ObjectiveConfig, OptimizerConfig
from dvi_jax.settings import require, require_count


@dataclass(frozen=True)
class LearnSettings:
    """How an engine learns.

    The policy term is off: it is right for proposals of the present drafter alone (`fast_update.py`), and a reply's
    come from whatever was live while it was made.
    """

    share: float = 0.1  # most of the device's time for learning while requests are there
    window: int = 256  # positions of a reply that are learned from, its newest
    fresh_windows: int = 4  # newest windows in an update
    replayed_windows: int = 12  # earlier windows in an update
    positions: int = 1024  # that pay for logits in an update; a quarter as many new ones are waited for
    logits_bytes: int = 1 << 28  # of memory, for those of one draft: with a large vocabulary fewer positions
    branches: int = 0  # of a window: drafts that were verified and not taken, which are learned from too; 0: none
    replay_bytes: int = 1 << 30  # of the device's memory, for windows
    replay_capacity: int = 256  # windows that are kept at most
    save_seconds: float = 60.0  # between snapshots
    seed: int = 0  # of the choice of windows
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(kl_min=1.0, pg_max=0.0))
    average: float = 0.97  # `OptimizerConfig.average` of a trained drafter; one from nothing moves too fast for it
    matrices: str = "muon"  # `OptimizerConfig.matrices` of a drafter from nothing, unless the model is too wide for it
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lora_lr=1.5e-3, head_lr=1.5e-3))

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "--learn-share", self.share, "above 0 and below 1")
        for name in ("window", "fresh_windows", "positions", "logits_bytes", "replay_bytes", "replay_capacity"):
            require_count(name, getattr(self, name), most=2**40)
        require_count("replayed_windows", self.replayed_windows, 0)
        require_count("--learn-branches", self.branches, 0, MOST_BRANCHES)
        require(0 <= self.average < 1, "average", self.average, "in [0, 1)")
        require(self.matrices in MATRICES, "matrices", self.matrices, " or ".join(MATRICES))
        given = self.optimizer.average
        require(not given, "optimizer.average", given, "0: a learning server's is the setting average")
        kind = self.optimizer.matrices
        require(kind == "adamw", "optimizer.matrices", kind, "adamw: a learning server's is the setting matrices")
        require(self.save_seconds >= 0, "--save-seconds", self.save_seconds, "0 or above")
