"""Online learning, the whole run: decode a stream of prompts speculatively and learn from every accept and reject.

    prompts -> rollout -> replay -> fast update -> (slow update, rollback, evaluation, snapshot) -> next prompts

Everything a run leaves lies in its `out` directory (`run_directory.py`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dvi_jax.checkpoint import Checkpoint, rewrite_checkpoint
from dvi_jax.config import TrainConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import Prompt, PromptSettings, PromptStream
from dvi_jax.decode.generate import Generation
from dvi_jax.errors import UserError
from dvi_jax.evaluate.acceptance import Acceptance, measure_acceptance
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.fast_update import Batch, LearnerState, fast_update, init_learner, with_trainable
from dvi_jax.learn.replay import Replay, Windows, push
from dvi_jax.learn.rollback import Watch, go_on_from, non_finite_updates
from dvi_jax.learn.rollout import rollout, window_length
from dvi_jax.learn.run_directory import Report, RunDirectory
from dvi_jax.learn.signals import StopSignals
from dvi_jax.learn.slow_update import init_slow, is_due, slow_update
from dvi_jax.load import LoadedModel, from_checkpoint, trained_parts


@dataclass
class Progress:
    """What a snapshot keeps beside the arrays (JSON)."""

    stream: dict | None = None  # PromptStream.state()
    prompts: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    save_seconds: float = 0.0  # of these, that learning stood still for saves
    save_due: bool = False  # put off while updates are non-finite
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """Read what `asdict` gave."""
        return cls(**data | {"watch": Watch(**data["watch"])})


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
    """Run an online training run, or go on with one (`resume`). `report` is called with every metrics record.

    SIGTERM and SIGINT end it after the running update with a snapshot (`signals.Stopped`, a `SystemExit`).
    """
    keep = {"keep": config.keep_checkpoints, "keep_best": config.keep_best}
    with RunDirectory(config.out, **keep, resume=resume, report=report) as directory:
        checkpoint = with_new_lora_d(with_new_drafter(open_checkpoint(config.checkpoint), config), config)
        run = _Run(config, checkpoint, directory)
        run.restore()
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

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, directory: RunDirectory):
        self.config, self.checkpoint, self.directory = config, checkpoint, directory
        self.model = from_checkpoint(checkpoint, seed=config.seed)
        if self.model.tokenizer is None:
            raise UserError(f"{checkpoint.path} has no tokenizer.json, which a conversation stream needs")
        self.window = window_length(config.decode, config.data.max_prompt_tokens)
        if self.window > self.model.config.context_length:
            raise UserError(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} and decode.max_new_tokens"
                f" {config.decode.max_new_tokens} exceed the model's context of"
                f" {self.model.config.context_length} tokens"
            )
        if config.slow.every and not self.model.params.lora_d:
            raise UserError("slow.every needs a verifier with a lora_D: set slow.rank_d")
        self.progress = Progress()
        self.stream = self._open_stream(None)
        self.held_out = self.stream.held_out_prompts(config.data.held_out_prompts)
        if not self.held_out:
            raise UserError("the stream has no held-out prompt: raise data.held_out_fraction or give more data")
        # On the host, for a rollback before the first snapshot.
        self.initial = jax.device_get(
            {name: getattr(self.model.params, name) for name in ("drafter", "lora_s", "lora_d")}
        )
        self.learner = self._start()
        self.before: Acceptance | None = None
        self.after: Acceptance | None = None
        self.evaluated = -1  # update of the last evaluation

    def restore(self) -> None:
        """Go back to the newest whole snapshot if the run resumes one: arrays, counters, stream position, metrics.

        A run killed before its first snapshot starts again from the beginning.
        """
        found, evaluations = self.directory.restore(self.learner)
        if found is None:
            return
        self.learner, self.progress = found.state, Progress.from_json(found.progress)
        self.stream = self._open_stream(self.progress.stream)
        self._take_over()
        if evaluations:
            self.before, self.after = (Acceptance(**evaluations[i]["acceptance"]) for i in (0, -1))
            self.evaluated = evaluations[-1]["step"]
        self.directory.report("resume", {"step": found.step, "prompts": self.progress.prompts})

    def learn(self) -> None:
        """Rollouts and updates until the prompts or the minutes are used up, or a signal asks to stop."""
        config = self.config
        with StopSignals() as signals:
            if self.before is None:
                self.before = self.evaluate()
            began, earlier = time.perf_counter(), self.progress.seconds
            for batches in self._cycles():
                if signals.received:  # who resumes reads these batches again
                    break
                self._update(batches)
                self.progress.seconds = earlier + time.perf_counter() - began
                self._evaluate_and_save()
                if config.max_minutes and self.progress.seconds > 60 * config.max_minutes:
                    break
            self.directory.save(self.learner, asdict(self.progress), regular=False)
            if signals.received:
                self.directory.stop(signals.received, int(self.learner.step))

    def finish(self) -> RunResult:
        """Evaluate, write the checkpoint with the trained drafter, and sum up."""
        step = int(self.learner.step)
        if self.evaluated != step:
            self.after = self.evaluate()
        path, exists = self.directory.checkpoint_path(step)
        if not exists:
            manifest = replace(self.model.manifest, training_step=step, verifier=self._verifier())
            rewrite_checkpoint(self.checkpoint, path, manifest=manifest, **trained_parts(self.model.params))
        self.directory.finish(step)
        stream = {"conversations": self.stream.conversations.summary(), "prompts": dict(self.stream.counts)}
        self._log("summary", {**asdict(self.progress), "stream": stream | (self.progress.stream or {})})
        return RunResult(self.before, self.after, step, self.progress, path, self.model, self.held_out, stream)

    def evaluate(self) -> Acceptance:
        """Held-out acceptance of the drafter as it now is, logged."""
        size, generations = self.config.rollout_batch, []
        for begin in range(0, len(self.held_out), size):
            batch = self.held_out[begin : begin + size]
            # The last batch is filled up so that every batch has one shape; the filling is not counted.
            _, finished = self._roll_out(self.model, batch + batch[:1] * (size - len(batch)))
            generations += finished[: len(batch)]
        acceptance, self.evaluated = measure_acceptance(generations), int(self.learner.step)
        self._log(
            "eval",
            {
                "accept_rate": acceptance.accept_rate,
                "tokens_per_round": acceptance.tokens_per_round,
                "acceptance": asdict(acceptance),
            },
        )
        return acceptance

    def _update(self, batches: list[list[Prompt]]) -> None:
        """One cycle: a rollout of each batch, the updates after the last, a record for each; maybe a rollback."""
        records: list[dict[str, Any]] = []
        for batch in batches:
            began = time.perf_counter()
            windows, generations = self._roll_out(self.model, batch)
            rolled = time.perf_counter()
            values = self._learn(windows, batches) if batch is batches[-1] else {}
            self.learner = self.learner.replace(replay=push(self.learner.replay, windows))
            record = self._count(generations)  # while the device is at work
            record |= self._fetch(values) | {"rollout_seconds": rolled - began}
            records.append(record | {"update_seconds": time.perf_counter() - rolled})
        self._take_over()
        self.progress.stream = self.stream.state()
        for record in records:
            self._log("train", record | {"save_seconds": self._take_save_seconds()})
        self.directory.log_failed_saves(int(self.learner.step))
        for batch, record in zip(batches, records, strict=True):
            if self._watch(batch, record["accept_rate"]):
                break  # the rollouts after it are of the drafter that was replaced

    def _count(self, generations: list[Generation]) -> dict[str, Any]:
        """Add a rollout to the progress: what its record says of it."""
        acceptance, progress = measure_acceptance(generations), self.progress
        progress.prompts += len(generations)
        progress.new_tokens += sum(len(generation.new_ids) for generation in generations)
        return {
            "prompts": progress.prompts,
            "new_tokens": progress.new_tokens,
            "accept_rate": acceptance.accept_rate,
            "tokens_per_round": acceptance.tokens_per_round,
        }

    def _fetch(self, values: dict[str, jax.Array]) -> dict[str, float]:
        """Metrics on the host, in one transfer with what else is asked for after an update (arrays keep their copy)."""
        state = self.learner
        values, _, _ = jax.device_get((values, state.step, state.optimizer.notfinite_count))
        return {name: float(value) for name, value in values.items()}

    def _watch(self, batch: list[Prompt], accept_rate: float) -> bool:
        """Go back to the last good state if updates stay non-finite or the drafter has collapsed (`rollback.py`)."""
        config, watch = self.config.rollback, self.progress.watch
        skipped = non_finite_updates(self.learner)
        suspected = watch.observe(accept_rate, config)
        if config.after and skipped >= config.after:
            self._roll_back(*self._last_good(), {"reason": f"{skipped} non-finite updates in a row"})
            return True
        if suspected:
            good, step = self._last_good(best=True)
            model = self.model.with_params(with_trainable(self.model.params, good.trainable))
            there = measure_acceptance(self._roll_out(model, batch)[1]).accept_rate
            values = {"accept_rate": accept_rate, "good_accept_rate": there, "snapshot": step}
            if accept_rate < config.collapse * there:
                self._roll_back(good, step, {"reason": "the drafter has collapsed", **values})
                return True
            watch.acquit(there)
            self._log("traffic_changed", values)
        return False

    def _last_good(self, *, best: bool = False) -> tuple[LearnerState, int | None]:
        """The state of the newest (or best) snapshot that is good and its update; the start if there is none."""
        found = self.directory.last_good(self.learner, self.progress.watch.is_good, int(self.learner.step), best=best)
        return (self._start(), None) if found is None else (found.state, found.step)

    def _roll_back(self, good: LearnerState, step: int | None, values: dict[str, Any]) -> None:
        """Go on from `good`, the state of the snapshot `step` (None: the start)."""
        watch = self.progress.watch
        watch.roll_back(int(self.learner.step), step, self.config.rollback)
        self.learner = go_on_from(good, self.learner)
        self._take_over()
        self._log("rollback", {**values, "snapshot": step, "rollbacks": watch.rollbacks})

    def _evaluate_and_save(self) -> None:
        """What fell due in a cycle. A snapshot waits until updates are finite: it is to be a good one."""
        config, progress, score = self.config, self.progress, None
        if self._fell_due(config.eval_every):
            self.after = self.evaluate()
            score = self.after.accept_rate
        progress.save_due |= self._fell_due(config.save_every)
        if progress.save_due and not non_finite_updates(self.learner):
            progress.save_due = False
            self.directory.save(self.learner, asdict(progress), score=score)

    def _fell_due(self, every: int) -> bool:
        """Whether the number of one of the cycle's rollouts is a multiple of `every`."""
        rollouts = self.progress.prompts // self.config.rollout_batch
        return rollouts // every > (rollouts - self.config.update_every) // every

    def _roll_out(self, model: LoadedModel, batch: list[Prompt]) -> tuple[Windows, list[Generation]]:
        prompts = [list(prompt.ids) for prompt in batch]
        return rollout(model, prompts, self.config.decode, longest_prompt=self.config.data.max_prompt_tokens)

    def _take_save_seconds(self) -> float:
        """Seconds that learning stood still for saves since the last call."""
        snapshots = self.directory.snapshots
        seconds, snapshots.waited_seconds = snapshots.waited_seconds, 0.0
        self.progress.save_seconds += seconds
        return seconds

    def _learn(self, windows: Windows, batches: list[list[Prompt]]) -> dict[str, jax.Array]:
        """The fast updates of one cycle and the slow one if due; metrics, of the first fast one (it is on-policy)."""
        config, values, step = self.config, {}, int(self.learner.step)
        size = Batch(config.fresh_windows, config.replayed_windows, config.positions_per_update)
        for index in range(config.updates_per_rollout):
            self.learner, found = fast_update(
                self.model.definition,
                self.model.params,
                self.learner,
                windows,
                np.array(index == 0),
                objective=config.objective,
                optimizer=config.optimizer,
                size=size,
            )
            values = values or found
        done = range(step + 1, step + config.updates_per_rollout + 1)
        if any(is_due(number, config.slow) for number in done):
            values |= self._learn_slowly([prompt for batch in batches for prompt in batch])
        return values

    def _learn_slowly(self, prompts: list[Prompt]) -> dict[str, jax.Array]:
        """A slow update on the log's answers to `prompts`."""
        config = self.config.slow
        shape = (config.rows, self.window)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, prompt in enumerate([prompt for prompt in prompts if prompt.log_ids][: config.rows]):
            ids = prompt.log_ids[: shape[1]]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, prompt.log_mask[: shape[1]]
        if not mask.any():
            return {}
        slow, values = slow_update(
            self.model.definition, self.model.params, self.learner.slow, tokens, mask, config=config
        )
        self.learner = self.learner.replace(slow=slow)
        return values

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

    def _cycles(self) -> Iterator[list[list[Prompt]]]:
        """`update_every` batches of `rollout_batch` prompts at a time; a shorter tail of the stream is left out."""
        prompts, size, count = iter(self.stream), self.config.rollout_batch, self.config.update_every
        while self.progress.prompts + count * size <= self.config.prompts:
            batches = [list(itertools.islice(prompts, size)) for _ in range(count)]
            if len(batches[-1]) < size:
                return
            yield batches

    def _open_stream(self, state: dict | None) -> PromptStream:
        data = self.config.data
        settings = PromptSettings(
            data.max_prompt_tokens, data.turns, data.held_out_fraction, with_log=self.config.slow.every > 0
        )
        return PromptStream(ConversationStream(data.files), self.model.tokenizer, settings, state=state)

    def _start(self) -> LearnerState:
        """The learner at update 0."""
        config, params = self.config, self.model.params._replace(**self.initial)
        replay = Replay.empty(config.replay_capacity, self.window, self.model.config.hidden_size)
        learner = init_learner(params, config.optimizer, replay, jax.random.key(config.seed))
        return learner.replace(slow=init_slow(params, config.slow)) if config.slow.every else learner

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self.directory.log(kind, int(self.learner.step), values)
