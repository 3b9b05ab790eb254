"""Online learning, the whole run: decode a stream of prompts speculatively and learn from every accept and reject.

    prompts -> rollout -> replay -> fast update -> (slow update, evaluation, snapshot) -> next prompts

Everything a run leaves lies in its `out` directory: metrics.jsonl, snapshots/, checkpoint/, curve.png.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import Checkpoint, read_checkpoint, rewrite_checkpoint
from dvi_jax.config import TrainConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import Prompt, PromptSettings, PromptStream
from dvi_jax.errors import UserError
from dvi_jax.evaluate.acceptance import Acceptance, measure_acceptance
from dvi_jax.learn.fast_update import fast_update, init_learner, with_trainable
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.replay import Replay, Windows, push
from dvi_jax.learn.rollout import rollout, window_length
from dvi_jax.learn.slow_update import init_slow, is_due, slow_update
from dvi_jax.learn.snapshot import Snapshots, refuse_earlier_run
from dvi_jax.load import LoadedModel, from_checkpoint, trained_parts

Report = Callable[[str, dict[str, Any]], None]  # (kind of record, record)


@dataclass
class Progress:
    """Counters of a run that a snapshot keeps beside the arrays."""

    stream: dict | None = None  # PromptStream.state()
    prompts: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `before` and `after` are held-out acceptance; `checkpoint` holds the trained drafter."""

    before: Acceptance
    after: Acceptance
    updates: int
    progress: Progress
    checkpoint: Path
    model: LoadedModel
    held_out: list[Prompt]
    stream: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, *, resume: bool = False, report: Report = lambda kind, record: None) -> RunResult:
    """Run an online training run, or go on with one (`resume`). `report` is called with every metrics record."""
    out = Path(config.out)
    if not resume:
        refuse_earlier_run(out)
    checkpoint = with_new_lora_d(with_new_drafter(read_checkpoint(config.checkpoint), config), config)
    with Snapshots(out / "snapshots", config.keep_checkpoints) as snapshots:
        run = _Run(config, checkpoint, snapshots, report)
        if resume:
            run.restore()
        else:
            run.metrics.rewind(-1)  # what a run killed before its first snapshot left
        run.learn()
        return run.finish()


def with_new_drafter(checkpoint: Checkpoint, config: TrainConfig) -> Checkpoint:
    """`checkpoint` with the run's exit layer and LoRA rank, unless it already holds a trained drafter."""
    manifest = checkpoint.manifest
    if checkpoint.drafter is not None:
        if config.exit_layer not in (None, manifest.exit_layer):
            raise UserError(
                f"exit_layer {config.exit_layer}: the checkpoint's drafter was trained at layer {manifest.exit_layer}"
            )
        return checkpoint
    options = {"rank": config.lora.rank_s, "alpha": config.lora.alpha_s} if manifest.drafter == "exit_head" else {}
    exit_layer = manifest.exit_layer if config.exit_layer is None else config.exit_layer
    return replace(checkpoint, manifest=replace(manifest, drafter_config=options, exit_layer=exit_layer))


def with_new_lora_d(checkpoint: Checkpoint, config: TrainConfig) -> Checkpoint:
    """`checkpoint` with a silent lora_D of the run's rank, unless it has LoRA sets in the layers already."""
    manifest = checkpoint.manifest
    if not config.slow.rank_d or manifest.lora:
        return checkpoint
    return replace(checkpoint, manifest=replace(manifest, lora={"rank_s": 0, "rank_d": config.slow.rank_d}))


class _Run:
    """The moving parts of one run."""

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, snapshots: Snapshots, report: Report):
        self.config, self.checkpoint, self.snapshots, self.report = config, checkpoint, snapshots, report
        self.model = from_checkpoint(checkpoint, seed=config.seed)
        if self.model.tokenizer is None:
            raise UserError(f"{checkpoint.path} has no tokenizer.json, which a conversation stream needs")
        window = window_length(config.decode, config.data.max_prompt_tokens)
        if window > self.model.config.max_position_embeddings:
            raise UserError(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} and decode.max_new_tokens"
                f" {config.decode.max_new_tokens} exceed the model's context of"
                f" {self.model.config.max_position_embeddings} tokens"
            )
        self.metrics = MetricsLog(Path(config.out) / "metrics.jsonl")
        self.progress = Progress()
        self.stream = self._open_stream(None)
        self.held_out = self.stream.held_out_prompts(config.data.held_out_prompts)
        if not self.held_out:
            raise UserError("the stream has no held-out prompt: raise data.held_out_fraction or give more data")
        architecture = self.model.config
        self.learner = init_learner(
            self.model.params,
            config.optimizer,
            Replay.empty(config.replay_capacity, window, architecture.hidden_size),
            jax.random.key(config.seed),
        )
        if config.slow.every:
            if not self.model.params.lora_d:
                raise UserError("slow.every needs a verifier with a lora_D: set slow.rank_d")
            self.learner = self.learner.replace(slow=init_slow(self.model.params, config.slow))
        self.before: Acceptance | None = None
        self.after: Acceptance | None = None

    def restore(self) -> None:
        """Go back to the newest snapshot: arrays, counters, stream position, and the metrics up to there.

        A run killed before its first snapshot starts again from the beginning.
        """
        restored = self.snapshots.restore(self.learner)
        if restored is None:
            self.metrics.rewind(-1)
            return
        self.learner, progress = restored
        self.progress = Progress(**progress)
        self.stream = self._open_stream(self.progress.stream)
        self._take_over()
        evaluations = [Acceptance(**record["acceptance"]) for record in self.metrics.rewind(int(self.learner.step))]
        if evaluations:
            self.before, self.after = evaluations[0], evaluations[-1]
        self.report("resume", {"step": int(self.learner.step), "prompts": self.progress.prompts})

    def learn(self) -> None:
        """Rollouts and updates until the prompts or the minutes are used up."""
        config = self.config
        if self.before is None:
            self.before = self.evaluate()
        began, earlier = time.perf_counter(), self.progress.seconds
        saved = -1
        for batch in self._batches():
            self._update(batch)
            self.progress.seconds = earlier + time.perf_counter() - began
            rollouts = self.progress.prompts // config.rollout_batch
            if rollouts % config.eval_every == 0:
                self.after = self.evaluate()
            if rollouts % config.save_every == 0:
                self._save()
                saved = rollouts
            if config.max_minutes and self.progress.seconds > 60 * config.max_minutes:
                break
        if saved != self.progress.prompts // config.rollout_batch:
            self._save()

    def finish(self) -> RunResult:
        """Evaluate, write the checkpoint with the trained drafter, and sum up."""
        evaluations = self.metrics.records("eval")
        if self.after is None or evaluations[-1]["step"] != int(self.learner.step):
            self.after = self.evaluate()
        path = Path(self.config.out) / "checkpoint"
        if path.exists():  # of the same run, before it was resumed
            path = Path(self.config.out) / f"checkpoint-{int(self.learner.step)}"
        manifest = replace(self.model.manifest, training_step=int(self.learner.step), verifier=self._verifier())
        rewrite_checkpoint(self.checkpoint, path, manifest=manifest, **trained_parts(self.model.params))
        stream = {"conversations": self.stream.conversations.summary(), "prompts": dict(self.stream.counts)}
        self._log("summary", {**asdict(self.progress), "stream": stream | (self.progress.stream or {})})
        return RunResult(
            self.before, self.after, int(self.learner.step), self.progress, path, self.model, self.held_out, stream
        )

    def evaluate(self) -> Acceptance:
        """Held-out acceptance of the drafter as it now is, logged."""
        size, generations = self.config.rollout_batch, []
        prompts = [list(prompt.ids) for prompt in self.held_out]
        for begin in range(0, len(prompts), size):
            batch = prompts[begin : begin + size]
            # The last batch is filled up so that every batch has one shape; the filling is not counted.
            filled = batch + batch[:1] * (size - len(batch))
            _, finished = rollout(
                self.model, filled, self.config.decode, longest_prompt=self.config.data.max_prompt_tokens
            )
            generations += finished[: len(batch)]
        acceptance = measure_acceptance(generations)
        self._log(
            "eval",
            {
                "accept_rate": acceptance.accept_rate,
                "tokens_per_round": acceptance.tokens_per_round,
                "acceptance": asdict(acceptance),
            },
        )
        return acceptance

    def _update(self, batch: list[Prompt]) -> None:
        """One rollout, one fast update, one metrics record."""
        config = self.config
        began = time.perf_counter()
        windows, generations = rollout(
            self.model,
            [list(prompt.ids) for prompt in batch],
            config.decode,
            longest_prompt=config.data.max_prompt_tokens,
        )
        rolled = time.perf_counter()
        values = self._learn_from(windows)
        self.learner = self.learner.replace(replay=push(self.learner.replay, windows))
        values |= self._learn_slowly(batch)
        self._take_over()
        acceptance = measure_acceptance(generations)
        new_tokens = sum(len(generation.new_ids) for generation in generations)
        self.progress.prompts += len(batch)
        self.progress.new_tokens += new_tokens
        self.progress.stream = self.stream.state()
        self._log(
            "train",
            {
                "prompts": self.progress.prompts,
                "new_tokens": self.progress.new_tokens,
                "accept_rate": acceptance.accept_rate,
                "tokens_per_round": acceptance.tokens_per_round,
                **values,
                "rollout_seconds": rolled - began,
                "update_seconds": time.perf_counter() - rolled,
            },
        )

    def _learn_from(self, windows: Windows) -> dict[str, float]:
        """The fast updates of one rollout; metrics of the first, whose policy term is on-policy."""
        config, first = self.config, {}
        for index in range(config.updates_per_rollout):
            self.learner, values = fast_update(
                self.model.graphdef,
                self.model.params,
                self.learner,
                windows,
                jnp.array(index == 0),
                objective=config.objective,
                optimizer=config.optimizer,
                replayed=config.replayed_windows,
                positions=config.positions_per_update,
            )
            first = first or values
        return {name: float(value) for name, value in first.items()}

    def _learn_slowly(self, batch: list[Prompt]) -> dict[str, float]:
        """A slow update on the log's answers to this batch, if one fell due with the last fast updates."""
        config, step = self.config.slow, int(self.learner.step)
        if not any(is_due(s, config) for s in range(step - self.config.updates_per_rollout + 1, step + 1)):
            return {}
        shape = (config.rows, window_length(self.config.decode, self.config.data.max_prompt_tokens))
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, prompt in enumerate([prompt for prompt in batch if prompt.log_ids][: config.rows]):
            ids = prompt.log_ids[: shape[1]]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, prompt.log_mask[: shape[1]]
        if not mask.any():
            return {}
        slow, values = slow_update(
            self.model.graphdef, self.model.params, self.learner.slow, tokens, mask, config=config
        )
        self.learner = self.learner.replace(slow=slow)
        return {name: float(value) for name, value in values.items()}

    def _take_over(self) -> None:
        """Decode with what was learned."""
        params = with_trainable(self.model.params, self.learner.trainable)
        if self.learner.slow is not None:
            params = params._replace(lora_d=self.learner.slow.lora_d)
        self.model = self.model.with_params(params)

    def _verifier(self) -> str:
        """The name of the verifier that output is lossless relative to."""
        updates = 0 if self.learner.slow is None else int(self.learner.slow.step)
        return (
            f"{self.checkpoint.manifest.verifier} + {updates} slow updates"
            if updates
            else self.checkpoint.manifest.verifier
        )

    def _batches(self) -> Iterator[list[Prompt]]:
        """Batches of `rollout_batch` prompts; a shorter tail of the stream is left out."""
        prompts = iter(self.stream)
        while self.progress.prompts + self.config.rollout_batch <= self.config.prompts:
            batch = list(itertools.islice(prompts, self.config.rollout_batch))
            if len(batch) < self.config.rollout_batch:
                return
            yield batch

    def _open_stream(self, state: dict | None) -> PromptStream:
        data = self.config.data
        settings = PromptSettings(
            data.max_prompt_tokens, data.turns, data.held_out_fraction, with_log=self.config.slow.every > 0
        )
        return PromptStream(ConversationStream(data.files), self.model.tokenizer, settings, state=state)

    def _save(self) -> None:
        self.metrics.flush()
        self.snapshots.save(self.learner, asdict(self.progress))

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        record = {"kind": kind, "step": int(self.learner.step), **values}
        self.metrics.append(record)
        self.report(kind, record)
