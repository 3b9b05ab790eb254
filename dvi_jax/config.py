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
from dvi_jax.mesh_config import MeshConfig as MeshConfig
from dvi_jax.settings import (
    FLOAT32,
    INT32,
    UINT32,
    from_dict,
    parse_yaml,
    read_yaml,
    require,
    require_count,
    require_path,
)
from dvi_jax.tools import shipped, shipped_names

MATRICES = ("adamw", "muon")  # what may move a drafter's matrices
MOST_DRAFTS = 16  # of a round that may all be right
MOST_RANK = 4096  # of a LoRA
MOST_BRANCHES = 1024  # of a window that is learned from
WHOLE_KV = "dtype"  # keys and values are kept as they are, in the model's dtype
KV = (WHOLE_KV, "int8", "float8")  # else in 8 bits (`model/kept_kv.py`)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How one generation drafts."""

    draft_steps: int = 3  # most drafts of a round that may all be right; a chain verifies one row more
    plan: str | None = None  # how a round drafts (`decode/plan.py`), at most draft_steps; None: as suits the device
    threshold: float = 0.0  # drafting stops after a draft less probable than this
    max_new_tokens: int = 64  # length of the answer, unless an end-of-sequence id comes before
    draft_cost: float = 0.0  # of one draft, in rounds that draft nothing; above 0, drafting stops where it does not pay

    def __post_init__(self) -> None:
        require(0 <= self.draft_cost <= 1, "draft_cost", self.draft_cost, "between 0 (off) and 1")
        require(0 <= self.draft_steps <= MOST_DRAFTS, "draft_steps", self.draft_steps, f"between 0 and {MOST_DRAFTS}")
        require(self.threshold >= 0, "threshold", self.threshold, "0 or above")
        require_count("max_new_tokens", self.max_new_tokens)

    @property
    def width(self) -> int:
        """Tokens of a sequence that a round commits at most, and rows that a chain verifies."""
        return self.draft_steps + 1


@dataclass(frozen=True)
class SamplingConfig:
    """How one sequence is sampled, in the order of Hugging Face's processors."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # only the k best tokens; 0: all
    top_p: float = 1.0  # the best tokens that together have this probability
    min_p: float = 0.0  # only tokens at least this share as probable as the best
    repetition_penalty: float = 1.0  # divides the logits of tokens that the sequence holds; 1: none
    seed: int = 0  # of the noise; the noise of a position depends on nothing else
    coupled: bool = True  # draft with the verifier's noise (`decode/sampling.py`); one value for a batch

    def __post_init__(self) -> None:
        require(0 <= self.temperature < FLOAT32, "temperature", self.temperature, "0 (greedy) or above")
        require(0 <= self.top_k <= INT32, "top_k", self.top_k, "0 (all tokens) or above, of 32 bits")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        require(0 < self.repetition_penalty < FLOAT32, "repetition_penalty", self.repetition_penalty, "above 0")
        require(0 <= self.seed <= UINT32, "seed", self.seed, "between 0 and 2**32 - 1")


@dataclass(frozen=True)
class DataConfig:
    """The conversation stream that prompts come from."""

    files: tuple[str, ...] = ()  # conversations: ShareGPT JSON, JSONL with messages, one question a line; - is stdin
    turns: str = "first"  # make a prompt of the first question alone, or of all
    max_prompt_tokens: int = 192  # longer prompts are left out
    held_out_fraction: float = 0.02  # share of the questions that is kept apart for evaluation
    held_out_prompts: int = 32  # how many of those an evaluation decodes

    def __post_init__(self) -> None:
        require(self.turns in ("first", "all"), "data.turns", self.turns, "first or all")
        for path in self.files:
            require_path("data.files", path)
        require_count("data.max_prompt_tokens", self.max_prompt_tokens)
        require(
            0 <= self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "at least 0 and below 1"
        )
        require_count("data.held_out_prompts", self.held_out_prompts)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the fast update's terms and the KL -> RL schedule (DVI, arXiv 2510.05421)."""

    schedule: str = "linear"  # linear, or exponential: exp(-(step - warmup) / ramp) mixes the two ends
    warmup: int = 100  # updates with KL weight `kl_max` and policy weight 0
    ramp: int = 200  # updates from there to `kl_min` and `pg_max`
    kl_max: float = 1.0  # KL weight at first
    kl_min: float = 0.05  # KL weight at last
    pg_max: float = 1.0  # policy weight at last
    ce_weight: float = 0.1  # of the cross-entropy with the verifier's token, where the draft was accepted
    tv_weight: float = 0.0  # of the total variation of verifier and draft, where KL is learned
    entropy_weight: float = 0.0  # of the drafter's entropy, which is rewarded
    kl_temperature: float = 1.0  # softens both distributions of the KL term
    baseline_momentum: float = 0.95  # of the moving average of the reward
    learn_from_prompt: bool = True  # learn at the positions of the prompt too, by KL alone
    unroll_steps: int = 3  # drafts of a round that are learned from (a block drafter: all of its block)
    unroll_decay: float = 0.8  # draft j weighs unroll_decay^j in the KL term

    def __post_init__(self) -> None:
        require(
            self.schedule in ("linear", "exponential"), "objective.schedule", self.schedule, "linear or exponential"
        )
        require_count("objective.warmup", self.warmup, 0)
        require_count("objective.ramp", self.ramp, 0)
        for name in ("kl_max", "kl_min", "pg_max", "ce_weight", "tv_weight", "entropy_weight"):
            require(getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), "0 or above")
        require(0 <= self.baseline_momentum < 1, "objective.baseline_momentum", self.baseline_momentum, "in [0, 1)")
        require_count("objective.unroll_steps", self.unroll_steps, 1, MOST_DRAFTS)
        require(0 <= self.unroll_decay <= 1, "objective.unroll_decay", self.unroll_decay, "between 0 and 1")
        require(self.kl_temperature > 0, "objective.kl_temperature", self.kl_temperature, "above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the drafter's matrices, with clipping by global norm.

    The default rates suit a distilled drafter, which higher ones make worse (experiments/results/README.md);
    one that starts from nothing takes ten times as much.
    """

    matrices: str = "adamw"  # what moves the drafter's: adamw, or muon, quicker from nothing (`optimizer.py`)
    lora_lr: float = 1.5e-4  # learning rate of lora_S
    head_lr: float = 1.5e-4  # learning rate of the drafter's own weights
    warmup: int = 20  # updates over which the rates rise linearly; 0: none
    b2: float = 0.999  # decay of Adam's second moment
    weight_decay: float = 0.0  # as in AdamW
    clip_norm: float = 1.0  # most global norm of a gradient
    average: float = 0.0  # decay, an update, of a moving average of the weights, which drafts in their place; 0: none

    def __post_init__(self) -> None:
        require(self.matrices in MATRICES, "optimizer.matrices", self.matrices, " or ".join(MATRICES))
        require(
            self.lora_lr > 0 and self.head_lr > 0, "optimizer.lora_lr/head_lr", (self.lora_lr, self.head_lr), "above 0"
        )
        require(0 <= self.warmup <= INT32, "optimizer.warmup", self.warmup, "0 (none) or above, of 32 bits")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or above")
        require(0 <= self.b2 < 1, "optimizer.b2", self.b2, "in [0, 1)")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "above 0")
        require(0 <= self.average < 1, "optimizer.average", self.average, "in [0, 1)")


@dataclass(frozen=True)
class SlowConfig:
    """The slow update of lora_D, the verifier's own adapter."""

    every: int = 0  # fast updates between two slow ones; 0: never
    rank_d: int = 0  # of a lora_D that is made where the checkpoint has none; 0: none
    rows: int = 4  # conversations of the log in an update
    beta: float = 0.1  # weight of the KL to the frozen verifier
    lr: float = 5e-6  # learning rate
    clip_norm: float = 1.0  # most global norm of a gradient

    def __post_init__(self) -> None:
        require_count("slow.every", self.every, 0)
        require_count("slow.rank_d", self.rank_d, 0, MOST_RANK)
        require_count("slow.rows", self.rows)
        require(self.clip_norm > 0, "slow.clip_norm", self.clip_norm, "above 0")
        require(self.lr > 0 and self.beta >= 0, "slow.lr/beta", (self.lr, self.beta), "above 0 / 0 or above")


@dataclass(frozen=True)
class RollbackConfig:
    """When learning goes back to its last good snapshot (`learn/rollback.py`)."""

    after: int = 3  # non-finite updates in a row; 0: never
    collapse: float = 0.5  # accept rate as a share of its best (0: never); online alone
    settle: int = 20  # rollouts before a collapse is looked for
    at_most: int = 5  # rollbacks in quick succession, then the run ends

    def __post_init__(self) -> None:
        require(0 <= self.after <= 5, "rollback.after", self.after, "between 0 (never) and 5")
        require(0 <= self.collapse < 1, "rollback.collapse", self.collapse, "0 (never) or a share below 1")
        require_count("rollback.settle", self.settle)
        require_count("rollback.at_most", self.at_most)


@dataclass(frozen=True)
class TrainConfig:
    """One online training run. What falls due within a cycle of `update_every` rollouts waits for its end."""

    checkpoint: str  # the model: a checkpoint, a Hugging Face directory, a GGUF file, a name in the local cache
    out: str  # directory of the run
    drafter: str | None = None  # kind of a new drafter; None: the checkpoint's
    drafter_options: dict[str, Any] = field(default_factory=dict, hash=False)  # of a new drafter
    exit_layer: int | None = None  # of a new drafter; None: the checkpoint's or 2 where it needs one, else 0
    kv: str = WHOLE_KV  # what the verifier's cache keeps keys and values in: dtype (the model's), int8 or float8
    seed: int = 0  # of new weights and of the choice of windows
    prompts: int = 2000  # decoded in all
    rollout_batch: int = 8  # prompts decoded at once
    update_every: int = 1  # rollouts between updates
    updates_per_rollout: int = 1  # updates then; those after the first are off-policy
    fresh_windows: int = 0  # windows of the newest rollout in an update; 0: all
    replayed_windows: int = 8  # windows of earlier rollouts in an update
    positions_per_update: int = 512  # positions of these windows that pay for logits
    replay_capacity: int = 256  # windows that are kept
    branches: int = 0  # of a window: drafts that were verified and not taken, which are learned from too; 0: none
    eval_every: int = 50  # rollouts between evaluations
    save_every: int = 50  # rollouts between snapshots
    keep_checkpoints: int = 2  # newest snapshots that are kept
    keep_best: int = 1  # snapshots kept by held-out accept rate, of those taken right after an evaluation
    max_minutes: float = 0.0  # of learning; 0: no limit
    tensorboard: bool = False  # also write the metrics as TensorBoard events, into `out`
    data: DataConfig = field(default_factory=DataConfig)  # the prompts
    decode: DecodeConfig = field(default_factory=DecodeConfig)  # how rollouts draft
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)  # the fast update's terms
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # the fast update's step
    slow: SlowConfig = field(default_factory=SlowConfig)  # the slow update
    mesh: MeshConfig = field(default_factory=MeshConfig)  # the devices
    rollback: RollbackConfig = field(default_factory=RollbackConfig)  # when to go back

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
            require_count(name, getattr(self, name))
        for name in ("updates_per_rollout", "replayed_windows", "keep_best"):
            require_count(name, getattr(self, name), 0)
        require_count("branches", self.branches, 0, MOST_BRANCHES)
        require(self.kv in KV, "kv", self.kv, "dtype (the model's), int8 or float8")
        _require_seed_and_paths(self.seed, self.checkpoint, self.out)
        self.mesh.require_rows("rollout_batch", self.rollout_batch)
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
        # What an average drafted says nothing of the weights that the gradient is of.
        on_policy = not (self.optimizer.average and self.objective.pg_max)
        require(on_policy, "objective.pg_max", self.objective.pg_max, "0, as optimizer.average is set")
        require(self.max_minutes >= 0, "max_minutes", self.max_minutes, "0 (no limit) or above")


@dataclass(frozen=True)
class DistillLoss:
    """What a draft's distribution is pulled towards the verifier's by: weights of a sum."""

    kl: float = 1.0  # KL(p_verify || p_draft)
    tv: float = 0.0  # total variation: how often rejection sampling would reject
    ce: float = 0.0  # cross-entropy with the verifier's first choice

    def __post_init__(self) -> None:
        weights = (self.kl, self.tv, self.ce)
        require(min(weights) >= 0 and sum(weights) > 0, "loss", weights, "weights of 0 or above, one of them above 0")


@dataclass(frozen=True)
class DistillConfig:
    """One run of teacher forcing over given text."""

    checkpoint: str  # the model, named as in `TrainConfig`
    out: str  # directory of the run
    data: tuple[str, ...]  # packed .npz files, or conversation files
    drafter: str = "fused"  # replaces an untrained drafter of the checkpoint, or one of another kind
    drafter_options: dict[str, Any] = field(default_factory=dict, hash=False)  # of a new drafter
    exit_layer: int | None = None  # of a new drafter; None: the checkpoint's or 2 where it needs one, else 0
    draft_vocabulary: int = 0  # most frequent tokens of the data, the only ones a new drafter drafts; 0: all
    tokens: int = 30_000_000  # of text in all, repetitions included
    row_length: int = 512  # tokens of a row
    batch_rows: int = 32  # rows of an update
    learn_from: str = "assistant"  # the assistant's tokens, or all
    targets: str = "verifier"  # the verifier's distribution, or the text's own tokens (log)
    loss: DistillLoss = field(default_factory=DistillLoss)  # with targets verifier
    shallow_rank: int = 0  # of a lora_S inside the shallow layers; with targets log and exit_head that is SGP
    unroll_steps: int = 3  # drafts of a round that are learned (a block drafter: all of its block)
    unroll_decay: float = 0.8  # draft j weighs unroll_decay^j
    lr: float = 1e-3  # highest learning rate
    matrices: str = "adamw"  # what moves the drafter's: as in `OptimizerConfig`
    warmup: int = 100  # updates over which the rate rises; then it falls to a tenth (cosine)
    weight_decay: float = 0.0  # as in AdamW
    clip_norm: float = 1.0  # most global norm of a gradient
    mesh: MeshConfig = field(default_factory=MeshConfig)  # the devices
    seed: int = 0  # of new weights and of the order of rows
    eval_rows: int = 64  # last rows of the data, which are held out
    log_every: int = 20  # updates between metrics records
    save_every: int = 500  # updates between snapshots
    keep_checkpoints: int = 2  # newest snapshots that are kept
    tensorboard: bool = False  # also write the metrics as TensorBoard events, into `out`
    rollback: RollbackConfig = field(default_factory=RollbackConfig)  # when to go back

    def __post_init__(self) -> None:
        require(self.learn_from in ("assistant", "all"), "learn_from", self.learn_from, "assistant or all")
        require(self.targets in ("verifier", "log"), "targets", self.targets, "verifier or log")
        require_count("shallow_rank", self.shallow_rank, 0, MOST_RANK)
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.matrices in MATRICES, "matrices", self.matrices, " or ".join(MATRICES))
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or above")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0")
        require(0 <= self.unroll_decay <= 1, "unroll_decay", self.unroll_decay, "between 0 and 1")
        require_count("draft_vocabulary", self.draft_vocabulary, 0)
        require_count("warmup", self.warmup, 0)
        require_count("unroll_steps", self.unroll_steps, 1, MOST_DRAFTS)
        for name in ("row_length", "batch_rows", "eval_rows", "log_every", "save_every", "keep_checkpoints"):
            require_count(name, getattr(self, name))
        self.mesh.require_rows("batch_rows", self.batch_rows)
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1")
        require(self.steps <= INT32, "tokens", self.tokens, f"at most {INT32} updates of batch_rows * row_length")
        _require_seed_and_paths(self.seed, self.checkpoint, self.out, *self.data)

    @property
    def steps(self) -> int:
        """Updates that the token budget allows."""
        return max(self.tokens // (self.batch_rows * self.row_length), 1)


def _require_seed_and_paths(seed: int, checkpoint: str, out: str, *data: str) -> None:
    require(0 <= seed <= UINT32, "seed", seed, "between 0 and 2**32 - 1")
    for name, path in (("checkpoint", checkpoint), ("out", out), *(("data", path) for path in data)):
        require_path(name, path)


TRAINERS = {"online": TrainConfig, "distill": DistillConfig}


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig | DistillConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML too).

    Its key `trainer` (online by default, or distill) says which settings the rest holds. `path` may be the name of a
    config that comes with the package, such as `demo`.
    """
    found = Path(path) if _is_file(path) else shipped("configs", str(path)) or Path(path)
    if str(path).isidentifier() and not _is_file(found):  # a name, and no path
        raise UserError(f"there is no config {path}: give a file, or one of {', '.join(shipped_names('configs'))}")
    data = read_yaml(found)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {override!r} must have the form section.key=value")
        _assign(data, key.split("."), parse_yaml(value, f"--set {override}"), override)
    trainer = data.pop("trainer", "online")
    require(trainer in tuple(TRAINERS), f"{path}: trainer", trainer, " or ".join(TRAINERS))
    places = {override.partition("=")[0]: f"--set {override}" for override in overrides}
    return from_dict(TRAINERS[trainer], data, str(path), places)


def _is_file(path: str | Path) -> bool:
    """A folder, such as the one that the demo makes, does not hide the config of its name."""
    try:
        return Path(path).is_file()
    except ValueError:  # a NUL in the path
        return False


def _assign(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override!r}: {key} is a value, not a section")
    data[keys[-1]] = value
