"""Every setting of the package: frozen dataclasses, read strictly from JSON and YAML (`settings.py`).

`LlamaConfig` (`architecture.py`) lives in a checkpoint's `config.json`; `TrainConfig` describes a training
run and lives in a YAML file, with `--set section.key=value` on top. Unknown keys and values out of range are errors
that name the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvi_jax.architecture import LlamaConfig as LlamaConfig
from dvi_jax.architecture import RopeScaling as RopeScaling
from dvi_jax.errors import UserError
from dvi_jax.settings import from_dict, parse_yaml, read_yaml, require


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How one generation drafts. `draft_steps + 1` rows are verified in every round.

    `draft_cost`: what a draft costs, in rounds that draft nothing; above 0, drafting also stops where it does not pay.
    """

    draft_steps: int = 3
    threshold: float = 0.0
    max_new_tokens: int = 64
    draft_cost: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.draft_cost <= 1, "draft_cost", self.draft_cost, "between 0 (off) and 1")
        require(0 <= self.draft_steps <= 16, "draft_steps", self.draft_steps, "between 0 and 16")
        require(self.threshold >= 0, "threshold", self.threshold, "0 or above")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How one row is sampled; temperature 0 is greedy. `coupled`: see `decode/sampling.py`; one value for a batch."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    coupled: bool = True

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or above")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")


@dataclass(frozen=True)
class DataConfig:
    """The conversation stream: local files, the turns used, and the share kept apart for evaluation."""

    files: tuple[str, ...] = ()
    turns: str = "first"
    max_prompt_tokens: int = 192
    held_out_fraction: float = 0.02
    held_out_prompts: int = 32

    def __post_init__(self) -> None:
        require(self.turns in ("first", "all"), "data.turns", self.turns, "first or all")
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", self.max_prompt_tokens, "at least 1")
        require(
            0 <= self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "at least 0 and below 1"
        )
        require(self.held_out_prompts >= 1, "data.held_out_prompts", self.held_out_prompts, "at least 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the fast update's four terms and the KL -> RL schedule (DVI paper, section on the schedule).

    KL weight `kl_max` and policy weight 0 for `warmup` updates, then over `ramp` updates to `kl_min` and `pg_max`; with
    `schedule` exponential instead lam = exp(-(step - warmup) / ramp) mixes the two ends.
    """

    schedule: str = "linear"
    warmup: int = 100
    ramp: int = 200
    kl_max: float = 1.0
    kl_min: float = 0.05
    pg_max: float = 1.0
    ce_weight: float = 0.1
    entropy_weight: float = 0.0
    kl_temperature: float = 1.0
    baseline_momentum: float = 0.95
    learn_from_prompt: bool = True
    unroll_steps: int = 3
    unroll_decay: float = 0.8

    def __post_init__(self) -> None:
        require(
            self.schedule in ("linear", "exponential"), "objective.schedule", self.schedule, "linear or exponential"
        )
        require(self.warmup >= 0 and self.ramp >= 0, "objective.warmup/ramp", (self.warmup, self.ramp), "0 or above")
        require(0 <= self.baseline_momentum < 1, "objective.baseline_momentum", self.baseline_momentum, "in [0, 1)")
        require(self.unroll_steps >= 1, "objective.unroll_steps", self.unroll_steps, "at least 1")
        require(self.kl_temperature > 0, "objective.kl_temperature", self.kl_temperature, "above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm; `head_lr` is for the drafter's own weights, `lora_lr` for lora_S.

    The defaults suit a distilled drafter, which higher rates make worse (experiments/README.md); one that starts from
    nothing takes ten times as much. The rates rise linearly over the first `warmup` updates; `b2` is the decay of
    Adam's second moment.
    """

    lora_lr: float = 1.5e-4
    head_lr: float = 1.5e-4
    warmup: int = 20
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.lora_lr > 0 and self.head_lr > 0, "optimizer.lora_lr/head_lr", (self.lora_lr, self.head_lr), "above 0"
        )
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 (none) or above")
        require(0 <= self.b2 < 1, "optimizer.b2", self.b2, "in [0, 1)")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True)
class SlowConfig:
    """The slow update of lora_D: after every `every`-th fast update (0: never), on `rows` rows of the log.

    `rank_d` makes a lora_D where the checkpoint has none.
    """

    every: int = 0
    rank_d: int = 0
    rows: int = 4
    beta: float = 0.1
    lr: float = 5e-6
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.every >= 0, "slow.every", self.every, "0 (never) or above")
        require(self.rank_d >= 0, "slow.rank_d", self.rank_d, "0 or above")
        require(self.rows >= 1, "slow.rows", self.rows, "at least 1")
        require(self.lr > 0 and self.beta >= 0, "slow.lr/beta", (self.lr, self.beta), "above 0 / 0 or above")


@dataclass(frozen=True)
class RollbackConfig:
    """When learning goes back to its last good snapshot (`learn/rollback.py`).

    `after`: non-finite updates in a row (0: never). `collapse`: accept rate as a share of its best (0: never), judged
    from `settle` rollouts on, online only. `at_most`: rollbacks in quick succession, then the run ends.
    """

    after: int = 3
    collapse: float = 0.5
    settle: int = 20
    at_most: int = 5

    def __post_init__(self) -> None:
        require(0 <= self.after <= 5, "rollback.after", self.after, "between 0 (never) and 5")
        require(0 <= self.collapse < 1, "rollback.collapse", self.collapse, "0 (never) or a share below 1")
        require(self.settle >= 1, "rollback.settle", self.settle, "at least 1")
        require(self.at_most >= 1, "rollback.at_most", self.at_most, "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """One online training run. `eval_every` and `save_every` count rollouts; `max_minutes` 0 means no limit.

    Every `update_every` rollouts come `updates_per_rollout` updates, each on `positions_per_update` positions of
    `fresh_windows` windows of the newest rollout (0: all) and `replayed_windows` of those before. What falls due in
    between waits. `keep_best` snapshots are kept by held-out accept rate, of those taken right after an evaluation.
    """

    checkpoint: str
    out: str
    drafter: str | None = None
    drafter_options: dict[str, Any] = field(default_factory=dict, hash=False)
    exit_layer: int | None = None
    seed: int = 0
    prompts: int = 2000
    rollout_batch: int = 8
    update_every: int = 1
    updates_per_rollout: int = 1
    fresh_windows: int = 0
    replayed_windows: int = 8
    positions_per_update: int = 512
    replay_capacity: int = 256
    eval_every: int = 50
    save_every: int = 50
    keep_checkpoints: int = 2
    keep_best: int = 1
    max_minutes: float = 0.0
    data: DataConfig = field(default_factory=DataConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    slow: SlowConfig = field(default_factory=SlowConfig)
    rollback: RollbackConfig = field(default_factory=RollbackConfig)

    def __post_init__(self) -> None:
        for name in (
            "prompts",
            "rollout_batch",
            "update_every",
            "positions_per_update",
            "replay_capacity",
            "eval_every",
            "save_every",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("updates_per_rollout", "replayed_windows", "keep_best"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        require(
            0 <= self.fresh_windows <= self.rollout_batch,
            "fresh_windows",
            self.fresh_windows,
            f"0 (all) or above, at most rollout_batch={self.rollout_batch}",
        )
        require(
            self.rollout_batch <= self.replay_capacity,
            "replay_capacity",
            self.replay_capacity,
            f"at least rollout_batch={self.rollout_batch}",
        )
        window = self.data.max_prompt_tokens + self.decode.max_new_tokens - 1
        most = (self.fresh_windows or self.rollout_batch) * window
        require(
            self.positions_per_update <= most,
            "positions_per_update",
            self.positions_per_update,
            f"at most {most}: fresh windows * (max_prompt_tokens + max_new_tokens - 1)",
        )
        require(self.decode.draft_steps >= 1, "decode.draft_steps", self.decode.draft_steps, "at least 1 to learn")
        require(self.max_minutes >= 0, "max_minutes", self.max_minutes, "0 (no limit) or above")


@dataclass(frozen=True)
class DistillConfig:
    """One run of teacher forcing over given text. `data` holds packed .npz files or conversation files.

    `drafter` replaces an untrained drafter of the checkpoint; `shallow_rank` puts a lora_S into the shallow layers too.
    `targets`: the verifier's distribution, or the text's own tokens (`log`; with exit_head and a `shallow_rank` that is
    SGP, the shallow-gradient path). `tokens` is the budget; the last `eval_rows` rows of the data are held out.
    """

    checkpoint: str
    out: str
    data: tuple[str, ...]
    drafter: str = "fused"
    drafter_options: dict[str, Any] = field(default_factory=dict, hash=False)
    exit_layer: int | None = None
    tokens: int = 30_000_000
    row_length: int = 512
    batch_rows: int = 32
    learn_from: str = "assistant"
    targets: str = "verifier"
    shallow_rank: int = 0
    unroll_steps: int = 3
    unroll_decay: float = 0.8
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    eval_rows: int = 64
    log_every: int = 20
    save_every: int = 500
    keep_checkpoints: int = 2
    rollback: RollbackConfig = field(default_factory=RollbackConfig)

    def __post_init__(self) -> None:
        require(self.learn_from in ("assistant", "all"), "learn_from", self.learn_from, "assistant or all")
        require(self.targets in ("verifier", "log"), "targets", self.targets, "verifier or log")
        require(self.shallow_rank >= 0, "shallow_rank", self.shallow_rank, "0 or above")
        require(self.lr > 0, "lr", self.lr, "above 0")
        counts = ("tokens", "row_length", "batch_rows", "unroll_steps", "eval_rows", "log_every", "save_every")
        for name in (*counts, "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    @property
    def steps(self) -> int:
        """Updates that the token budget allows."""
        return max(self.tokens // (self.batch_rows * self.row_length), 1)


TRAINERS = {"online": TrainConfig, "distill": DistillConfig}


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig | DistillConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML too).

    Its key `trainer` (online by default, or distill) says which settings the rest holds.
    """
    data = read_yaml(path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {override!r} must have the form section.key=value")
        _assign(data, key.split("."), parse_yaml(value, f"--set {override}"), override)
    trainer = data.pop("trainer", "online")
    require(trainer in tuple(TRAINERS), f"{path}: trainer", trainer, " or ".join(TRAINERS))
    return from_dict(TRAINERS[trainer], data, str(path))


def _assign(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {key} is a value, not a section")
    data[keys[-1]] = value
