"""Online learning, the whole run: decode a stream of prompts speculatively and learn from every accept and reject.

    prompts -> rollout -> replay -> fast update -> (slow update, rollback, evaluation, snapshot) -> next prompts

Everything a run leaves lies in its `out` directory (`run_directory.py`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import TrainConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import Prompt, PromptStream
from dvi_jax.decode.acceptance import Acceptance, measure_acceptance
from dvi_jax.decode.batch import Generation, choose_plan
from dvi_jax.decode.memory import check_room
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.fast_update import Batch, LearnerState, fast_update, init_learner, with_trainable
from dvi_jax.learn.new_drafter import kept_or_new_drafter
from dvi_jax.learn.replay import Replay, Windows, check_branches, push, window_bytes
from dvi_jax.learn.rollout import rollout, window_length
from dvi_jax.learn.run import Run
from dvi_jax.learn.run_directory import Report, RunDirectory
from dvi_jax.learn.run_identity import RunIdentity, identify
from dvi_jax.learn.shared_directory import open_directory
from dvi_jax.learn.shared_gradient import check_learning
from dvi_jax.learn.slow_update import init_slow, is_due, slow_update
from dvi_jax.learn.stopping import StopSignals
from dvi_jax.loading import LoadedModel, from_checkpoint
from dvi_jax.mesh import make_mesh
from dvi_jax.model.speculative_llama import Params


@dataclass
class Progress:
    """What a snapshot keeps beside the arrays and the watch (JSON)."""

    stream: dict[str, Any] | None = None  # PromptStream.state()
    prompts: int = 0  # decoded
    new_tokens: int = 0  # that they gave
    seconds: float = 0.0  # of learning
    save_seconds: float = 0.0  # of these, that learning stood still for saves
    save_due: bool = False  # put off while updates are non-finite


@dataclass(frozen=True)
class OnlineResult:
    """What a run came to."""

    before: Acceptance  # held out, at the beginning
    after: Acceptance  # held out, at the end
    updates: int
    progress: Progress
    checkpoint: Path  # with the trained drafter
    model: LoadedModel  # the same in memory
    held_out: list[Prompt]
    stream: dict[str, Any] = field(default_factory=dict)  # what was read, and what was left out and why


def train_online(
    config: TrainConfig, *, resume: bool = False, report: Report = lambda kind, record: None
) -> OnlineResult:
    """Run an online training run, or go on with one (`resume`). `report` is called with every metrics record.

    SIGTERM and SIGINT end it with `stopping.Stopped`, a `SystemExit`: after the running update, with a snapshot.
    """
    directory = open_directory(
        config.out,
        keep=config.keep_checkpoints,
        keep_best=config.keep_best,
        resume=resume,
        report=report,
        tensorboard=config.tensorboard,
    )
    with StopSignals() as signals, directory:
        checkpoint = open_checkpoint(config.checkpoint, lazy=config.mesh.is_several)
        checkpoint = kept_or_new_drafter(checkpoint, config.drafter, config.drafter_options, config.exit_layer)
        run = OnlineRun(config, with_new_lora_d(checkpoint, config), directory)
        run.restore()
        run.learn(signals)
        return run.finish()


def with_new_lora_d(checkpoint: Checkpoint, config: TrainConfig) -> Checkpoint:
    """`checkpoint` with a silent lora_D of the run's rank, unless it has LoRA sets in the layers already."""
    manifest = checkpoint.manifest
    if not config.slow.rank_d or manifest.lora:
        return checkpoint
    return replace(checkpoint, manifest=replace(manifest, lora={"rank_s": 0, "rank_d": config.slow.rank_d}))


class OnlineRun(Run[LearnerState, Acceptance]):
    """One run over a stream of prompts."""

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, directory: RunDirectory):
        self.config = config
        model = from_checkpoint(checkpoint, kv=config.kv, seed=config.seed, mesh=make_mesh(config.mesh))
        self.window = window_length(config.decode, config.data.max_prompt_tokens)
        self._check(model)
        self.tokenizer = model.need_tokenizer(
            f"{checkpoint.path} has no tokenizer.json, which a conversation stream needs"
        )
        super().__init__(checkpoint, model, directory, config.rollback)
        self.progress = Progress()
        self.stream = self._open_stream(None)
        self.held_out = self.stream.held_out_prompts(config.data.held_out_prompts)
        if not self.held_out:
            raise UserError("the stream has no held-out prompt: raise data.held_out_fraction or give more data")

    def _check(self, model: LoadedModel) -> None:
        """Raise `UserError` for settings that this model cannot serve."""
        config = self.config
        if self.window > model.config.context_length:
            raise UserError(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} and decode.max_new_tokens"
                f" {config.decode.max_new_tokens} exceed the model's context of"
                f" {model.config.context_length} tokens"
            )
        kept_apart = model.manifest.held_out_fraction
        if kept_apart and config.data.held_out_fraction > kept_apart:
            raise UserError(
                f"data.held_out_fraction must be at most {kept_apart}, got {config.data.held_out_fraction}:"
                " this drafter was trained on all other questions"
            )
        if config.slow.every and not model.params.lora_d:
            raise UserError("slow.every needs a verifier with a lora_D: set slow.rank_d")
        check_learning(model, slowly=config.slow.every > 0)
        choose_plan(model, config.decode)
        if config.branches:
            check_branches(model, config.objective.unroll_steps)
        window = window_bytes(self.window, model.config.hidden_size, len(model.taps), config.branches)
        kept = f"replay_capacity {config.replay_capacity} and rollout_batch {config.rollout_batch}"
        check_room((config.replay_capacity + config.rollout_batch) * window, kept)

    def initial_state(self, params: Params) -> LearnerState:
        config = self.config
        taps = len(self.model.taps)
        width = self.model.config.hidden_size
        replay = Replay.empty(config.replay_capacity, self.window, width, taps, config.branches)
        learner = init_learner(params, config.optimizer, replay, jax.random.key(config.seed))
        return learner.replace(slow=init_slow(params, config.slow)) if config.slow.every else learner

    def identity(self) -> RunIdentity:
        files = [path if path == "-" else os.path.abspath(path) for path in self.config.data.files]
        return identify(self.config, self.checkpoint, self.model.manifest, {"data.files": files})

    def manifest(self) -> Manifest:
        """With the smallest share of questions that was kept apart since its drafter was new."""
        shares = self.model.manifest.held_out_fraction, self.config.data.held_out_fraction
        return replace(super().manifest(), held_out_fraction=min(filter(None, shares), default=0.0))

    def drafting(self) -> tuple[str, int]:
        return self.config.decode.plan or "", self.config.decode.draft_steps

    def learned(self) -> dict[str, Any]:
        slow = self.state.slow
        return self.state.served if slow is None else self.state.served | {"lora_d": slow.lora_d}

    def progress_record(self) -> dict[str, Any]:
        return asdict(self.progress) | {"watch": asdict(self.watch)}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        self.progress = Progress(**{name: value for name, value in progress.items() if name != "watch"})
        self.stream = self._open_stream(self.progress.stream)

    def work(self, signals: StopSignals) -> None:
        """Rollouts and updates until the prompts or the minutes are used up, or a signal asks to stop."""
        config = self.config
        began, earlier = time.perf_counter(), self.progress.seconds
        for batches in self._cycles():
            if signals.received:  # a resumed run reads these batches again
                break
            self._update(batches)
            self.progress.seconds = earlier + time.perf_counter() - began
            self._evaluate_and_save()
            if config.max_minutes and self.progress.seconds > 60 * config.max_minutes:
                self.directory.report("time_limit", {"step": self.step, "minutes": config.max_minutes})
                break

    def finish(self) -> OnlineResult:
        """Write the checkpoint with the trained drafter, and sum up."""
        path = self.write_checkpoint()
        stream = {"conversations": self.stream.conversations.summary(), "prompts": dict(self.stream.counts)}
        self.log("summary", {**self.progress_record(), "stream": stream | (self.progress.stream or {})})
        assert self.before is not None
        assert self.after is not None
        return OnlineResult(self.before, self.after, self.step, self.progress, path, self.model, self.held_out, stream)

    def measure(self) -> tuple[Acceptance, dict[str, Any]]:
        """Held-out acceptance."""
        size, generations = self.config.rollout_batch, []
        for begin in range(0, len(self.held_out), size):
            batch = self.held_out[begin : begin + size]
            # The last batch is filled up so that every batch has one shape; the filling is not counted.
            _, finished = self._roll_out(self.model, batch + batch[:1] * (size - len(batch)))
            generations += finished[: len(batch)]
        acceptance = measure_acceptance(generations)
        return acceptance, {
            "accept_rate": acceptance.accept_rate,
            "tokens_per_round": acceptance.tokens_per_round,
            "acceptance": asdict(acceptance),
        }

    def measured(self, record: dict[str, Any]) -> Acceptance:
        return Acceptance(**record["acceptance"])

    def _update(self, batches: list[list[Prompt]]) -> None:
        """One cycle: a rollout of each batch, the updates after the last, a record for each; maybe a rollback."""
        records: list[dict[str, Any]] = []
        for batch in batches:
            began = time.perf_counter()
            windows, generations = self._roll_out(self.model, batch)
            rolled = time.perf_counter()
            values = self._learn_from(windows, batches) if batch is batches[-1] else {}
            self.state = self.state.replace(replay=push(self.state.replay, windows))
            record = self._count(generations)  # while the device is at work
            record |= self._fetch(values) | {"rollout_seconds": rolled - began}
            records.append(record | {"update_seconds": time.perf_counter() - rolled})
        self.take_over()
        self.progress.stream = self.stream.state()
        for record in records:
            self.log("train", record | {"save_seconds": self._take_save_seconds()})
        self.directory.log_failed_saves(self.step)
        for batch, record in zip(batches, records, strict=True):
            if self.has_non_finite_updates() or self._has_collapsed(batch, record["accept_rate"]):
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
        state = self.state
        values, _, _ = jax.device_get((values, state.step, state.optimizer.notfinite_count))
        return {name: float(value) for name, value in values.items()}

    def _has_collapsed(self, batch: list[Prompt], accept_rate: float) -> bool:
        """Whether the drafter has become worse than its best snapshot; then the run has gone back (`rollback.py`)."""
        watch, config = self.watch, self.rollback
        if not watch.observe(accept_rate, config):
            return False
        # Only suspected as yet: the best snapshot's drafter decodes the very same prompts.
        good, step = self.last_good(best=True)
        model = self.model.with_params(with_trainable(self.model.params, good.served))
        there = measure_acceptance(self._roll_out(model, batch)[1]).accept_rate
        values = {"accept_rate": accept_rate, "good_accept_rate": there, "snapshot": step}
        if accept_rate < config.collapse * there:
            self.roll_back(good, step, {"reason": "the drafter has collapsed", **values})
            return True
        watch.acquit(there)
        self.log("traffic_changed", values)
        return False

    def _evaluate_and_save(self) -> None:
        """What fell due in a cycle. A snapshot waits until updates are finite: it is to be a good one."""
        config, progress, score = self.config, self.progress, None
        if self._fell_due(config.eval_every):
            self.after = self.evaluate()
            score = self.after.accept_rate
        due = progress.save_due or self._fell_due(config.save_every)
        progress.save_due = False  # as the snapshot is to remember it
        progress.save_due = due and not self.save(score=score)

    def _fell_due(self, every: int) -> bool:
        """Whether the number of one of the cycle's rollouts is a multiple of `every`."""
        rollouts = self.progress.prompts // self.config.rollout_batch
        return rollouts // every > (rollouts - self.config.update_every) // every

    def _roll_out(self, model: LoadedModel, batch: list[Prompt]) -> tuple[Windows, list[Generation]]:
        prompts = [list(prompt.ids) for prompt in batch]
        config = self.config
        longest = config.data.max_prompt_tokens
        return rollout(model, prompts, config.decode, longest_prompt=longest, branches=config.branches)

    def _take_save_seconds(self) -> float:
        """Seconds that learning stood still for saves since the last call."""
        snapshots = self.directory.snapshots
        seconds, snapshots.waited_seconds = snapshots.waited_seconds, 0.0
        self.progress.save_seconds += seconds
        return seconds

    def _learn_from(self, windows: Windows, batches: list[list[Prompt]]) -> dict[str, jax.Array]:
        """The fast updates of one cycle and the slow one if due; metrics, of the first fast one (it is on-policy)."""
        config, step = self.config, self.step
        values: dict[str, jax.Array] = {}
        size = Batch(config.fresh_windows, config.replayed_windows, config.positions_per_update)
        for index in range(config.updates_per_rollout):
            self.state, found = fast_update(
                self.model.definition,
                self.model.params,
                self.state,
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
            self.model.definition, self.model.params, self.state.slow, tokens, mask, config=config
        )
        self.state = self.state.replace(slow=slow)
        return values

    def verifier(self) -> str:
        updates = 0 if self.state.slow is None else int(self.state.slow.step)
        return super().verifier() + (f" + {updates} slow updates" if updates else "")

    def _cycles(self) -> Iterator[list[list[Prompt]]]:
        """`update_every` batches of `rollout_batch` prompts at a time; a shorter tail of the stream is left out."""
        prompts, size, count = iter(self.stream), self.config.rollout_batch, self.config.update_every
        while self.progress.prompts + count * size <= self.config.prompts:
            batches = [list(itertools.islice(prompts, size)) for _ in range(count)]
            if len(batches[-1]) < size:
                return
            yield batches

    def _open_stream(self, state: dict[str, Any] | None) -> PromptStream:
        conversations = ConversationStream(self.config.data.files)
        with_log = self.config.slow.every > 0
        return PromptStream(conversations, self.tokenizer, self.config.data, with_log=with_log, state=state)
