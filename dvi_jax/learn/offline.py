"""Offline training, the whole run: distillation over packed text, with metrics, snapshots and a final checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import Checkpoint, rewrite_checkpoint
from dvi_jax.config import DistillConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import from_first_question
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.distill import DistillState, distill_metrics, distill_step, init_distill
from dvi_jax.learn.fast_update import with_trainable
from dvi_jax.learn.packing import Packed, load_packed, pack
from dvi_jax.learn.rollback import Watch, go_on_from, non_finite_updates
from dvi_jax.learn.run_directory import Report, RunDirectory
from dvi_jax.learn.signals import StopSignals
from dvi_jax.load import LoadedModel, from_checkpoint, trained_parts


@dataclass(frozen=True)
class DistillResult:
    """`before` and `after`: held-out agreement of each unrolled draft with the verifier."""

    before: list[float]
    after: list[float]
    tokens: int
    seconds: float
    checkpoint: Path
    model: LoadedModel


def distill(
    config: DistillConfig, *, resume: bool = False, report: Report = lambda kind, record: None
) -> DistillResult:
    """Run a distillation, or go on with one (`resume`). `report` is called with every metrics record.

    SIGTERM and SIGINT end it after the running update with a snapshot (`signals.Stopped`, a `SystemExit`).
    """
    with RunDirectory(config.out, keep=config.keep_checkpoints, keep_best=0, resume=resume, report=report) as directory:
        checkpoint = with_drafter(
            open_checkpoint(config.checkpoint), config.drafter, config.exit_layer, config.shallow_rank
        )
        run = _Run(config, checkpoint, directory)
        run.restore()
        run.learn()
        return run.finish()


def with_drafter(checkpoint: Checkpoint, kind: str, exit_layer: int | None, shallow_rank: int = 0) -> Checkpoint:
    """`checkpoint` with an untrained drafter of `kind` at `exit_layer`, unless it holds a trained one of that kind.

    `shallow_rank` gives the new drafter a lora_S inside the shallow layers.
    """
    manifest = checkpoint.manifest
    wanted = manifest.exit_layer if exit_layer is None else exit_layer
    if checkpoint.drafter is not None and (manifest.drafter, manifest.exit_layer) == (kind, wanted):
        return checkpoint
    options = manifest.drafter_config if manifest.drafter == kind else {}
    manifest = replace(manifest, drafter=kind, drafter_config=options, exit_layer=wanted, training_step=0)
    manifest = replace(manifest, lora={"rank_s": shallow_rank, "rank_d": 0} if shallow_rank else {})
    return replace(checkpoint, manifest=manifest, drafter=None, lora=None)


def read_data(config: DistillConfig, checkpoint: Checkpoint) -> Packed:
    """Packed files as they are; conversation files tokenised and packed."""
    if all(path.endswith(".npz") for path in config.data):
        data = load_packed(config.data)
    else:
        data = pack_conversations(
            config.data, Tokenizer.from_checkpoint(checkpoint), config.row_length, checkpoint.config.vocab_size
        )
    if data.tokens.shape[1] != config.row_length:
        raise UserError(f"row_length is {config.row_length}, the packed data has rows of {data.tokens.shape[1]}")
    if data.tokens.max() >= checkpoint.config.vocab_size:
        raise UserError(f"the packed data has token {data.tokens.max()}, beyond the model's vocabulary")
    return replace(data, mask=np.ones_like(data.mask)) if config.learn_from == "all" else data


def pack_conversations(files: Sequence[str], tokenizer: Tokenizer, row_length: int, vocab_size: int) -> Packed:
    """Every conversation of the files, from its first question on, through the chat template; answers are marked."""

    def sequences() -> Iterator[tuple[list[int], list[bool]]]:
        for conversation in ConversationStream(files):
            try:
                yield tokenizer.encode_conversation(from_first_question(conversation.messages))
            except TemplateRefusedError:
                continue

    return pack(sequences(), row_length, vocab_size)


class _Run:
    """The moving parts of one run."""

    def __init__(self, config: DistillConfig, checkpoint: Checkpoint, directory: RunDirectory):
        self.config, self.checkpoint, self.directory = config, checkpoint, directory
        # What programs are compiled for: the same for every run in this process that differs in its directory alone.
        self.compiled_for = replace(config, checkpoint="", out="", data=())
        self.data, self.held_out = read_data(config, checkpoint).hold_out(config.eval_rows)
        self.model = from_checkpoint(checkpoint, seed=config.seed)
        self.state, self.watch, self.seconds = init_distill(self.model.params, config), Watch(), 0.0
        self.before: list[float] | None = None
        self.after: list[float] | None = None
        self.evaluated = -1  # update of the last evaluation

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def restore(self) -> None:
        """Go back to the newest whole snapshot if the run resumes one, else to the beginning."""
        found, evaluations = self.directory.restore(self.state)
        if found is None:
            return
        self.state, self.seconds = found.state, found.progress["seconds"]
        self.watch = Watch(**found.progress["watch"])
        if evaluations:
            self.before, self.after = evaluations[0]["agreement"], evaluations[-1]["agreement"]
            self.evaluated = evaluations[-1]["step"]
        self.directory.report("resume", {"step": found.step})

    def learn(self) -> None:
        """Updates until the tokens are used up, or a signal asks to stop."""
        config = self.config
        with StopSignals() as signals:
            if self.before is None:
                self.before = self.evaluate()
            began, earlier = time.perf_counter(), self.seconds
            since, logged = began, self.step
            batches = self.data.batches(config.batch_rows, config.seed, skip=logged)
            for step in range(logged + 1, config.steps + 1):
                if signals.received:
                    break
                tokens, mask = next(batches)
                self.state, values = distill_step(
                    self.model.definition, self.model.params, self.state, tokens, mask, config=self.compiled_for
                )
                is_logged = step % config.log_every == 0 or step == config.steps
                if is_logged:
                    jax.block_until_ready(values)  # a clock read earlier would count dispatching alone
                self.seconds = earlier + time.perf_counter() - began
                if is_logged:
                    self._log_update(step, values, (step - logged) / (time.perf_counter() - since))
                    since, logged = time.perf_counter(), step
                if step % config.save_every == 0:
                    self._save()
            self._save(regular=False)
            if signals.received:
                self.directory.stop(signals.received, self.step)

    def finish(self) -> DistillResult:
        """Evaluate and write the checkpoint with the trained drafter."""
        config = self.config
        if self.evaluated != self.step:
            self.after = self.evaluate()
        model = self._trained()
        path, exists = self.directory.checkpoint_path(self.step)
        if not exists:
            manifest = replace(model.manifest, training_step=self.step)
            rewrite_checkpoint(self.checkpoint, path, manifest=manifest, **trained_parts(model.params))
        self.directory.finish(self.step)
        tokens = config.steps * config.batch_rows * config.row_length
        return DistillResult(self.before, self.after, tokens, self.seconds, path, model)

    def evaluate(self) -> list[float]:
        """Held-out agreement of each unrolled draft with the verifier, logged."""
        values, self.evaluated = _evaluate(self._trained(), self.held_out, self.compiled_for), self.step
        self.directory.log("eval", self.step, values)
        return values["agreement"]

    def _trained(self) -> LoadedModel:
        return self.model.with_params(with_trainable(self.model.params, self.state.trainable))

    def _log_update(self, step: int, metrics: dict[str, jax.Array], updates_per_second: float) -> None:
        """A metrics record; and a rollback if too many updates in a row were non-finite (`rollback.py`)."""
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        tokens = self.config.batch_rows * self.config.row_length
        rate = updates_per_second * tokens
        self.directory.log("train", step, {"tokens": step * tokens, "tokens_per_second": rate, **values})
        self.directory.log_failed_saves(step)
        skipped, config = non_finite_updates(self.state), self.config.rollback
        self.watch.checks += 1
        if config.after and skipped >= config.after:
            good, found = self._last_good()
            self.watch.roll_back(step, found, config)
            self.state = go_on_from(good, self.state)
            reason = f"{skipped} non-finite updates in a row"
            self.directory.log(
                "rollback", step, {"reason": reason, "snapshot": found, "rollbacks": self.watch.rollbacks}
            )

    def _last_good(self) -> tuple[DistillState, int | None]:
        """The state of the newest good snapshot and its update; the start if there is none."""
        found = self.directory.last_good(self.state, self.watch.is_good, self.step)
        return (init_distill(self.model.params, self.config), None) if found is None else (found.state, found.step)

    def _save(self, *, regular: bool = True) -> None:
        """Save in the background; a regular snapshot only of a state that updates have not begun to fail on."""
        if not regular or not non_finite_updates(self.state):
            progress = {"seconds": self.seconds, "watch": asdict(self.watch)}
            self.directory.save(self.state, progress, regular=regular)


def _evaluate(model: LoadedModel, rows: Packed, config: DistillConfig) -> dict[str, Any]:
    """Held-out means, batch by batch (rows beyond a whole batch are left out)."""
    size = min(config.batch_rows, len(rows.tokens))
    parts = []
    for begin in range(0, len(rows.tokens) - size + 1, size):
        tokens = jnp.asarray(rows.tokens[begin : begin + size].astype(np.int32))
        mask = jnp.asarray(rows.mask[begin : begin + size])
        parts.append(distill_metrics(model.definition, model.params, tokens, mask, config=config))
    weights = np.array([part["positions"] for part in parts])
    mean = jax.tree.map(lambda *x: np.average(np.stack(x), axis=0, weights=weights).tolist(), *parts)
    return {"kl": mean["kl"], "agreement": mean["agreement"], "tokens_per_round": expected_tokens(mean["agreement"])}


def expected_tokens(agreement: Sequence[float]) -> float:
    """Tokens per round if draft j were accepted with probability `agreement[j]` once those before it were."""
    expected, reached = 1.0, 1.0
    for rate in agreement:
        reached *= rate
        expected += reached
    return expected
