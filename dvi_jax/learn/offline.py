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

from dvi_jax.checkpoint import Checkpoint
from dvi_jax.config import DistillConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import from_first_question
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_tree
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.distill import DistillState, distill_metrics, distill_step, init_distill
from dvi_jax.learn.new_drafter import matching_or_new_drafter
from dvi_jax.learn.packing import Packed, load_packed, pack
from dvi_jax.learn.run import Run
from dvi_jax.learn.run_directory import Report, RunDirectory
from dvi_jax.learn.run_identity import RunIdentity, identify
from dvi_jax.learn.shared_directory import open_directory
from dvi_jax.learn.shared_gradient import check_learning
from dvi_jax.learn.stopping import StopSignals
from dvi_jax.loading import LoadedModel, from_checkpoint
from dvi_jax.mesh import make_mesh
from dvi_jax.model.speculative_llama import Params


@dataclass(frozen=True)
class OfflineResult:
    """What a run came to. Agreement: how often the verifier's token is the top one of each unrolled draft."""

    before: list[float]  # held-out agreement at the beginning
    after: list[float]  # and at the end
    tokens: int  # of text that went through
    seconds: float
    checkpoint: Path  # with the trained drafter
    model: LoadedModel  # the same in memory


def train_offline(
    config: DistillConfig, *, resume: bool = False, report: Report = lambda kind, record: None
) -> OfflineResult:
    """Run a distillation, or go on with one (`resume`). `report` is called with every metrics record.

    SIGTERM and SIGINT end it with `stopping.Stopped`, a `SystemExit`: after the running update, with a snapshot.
    """
    directory = open_directory(
        config.out,
        keep=config.keep_checkpoints,
        keep_best=0,
        resume=resume,
        report=report,
        tensorboard=config.tensorboard,
    )
    with StopSignals() as signals, directory:
        checkpoint = matching_or_new_drafter(
            open_checkpoint(config.checkpoint, lazy=config.mesh.is_several),
            config.drafter,
            config.drafter_options,
            config.exit_layer,
            config.shallow_rank,
        )
        run = OfflineRun(config, checkpoint, directory)
        run.restore()
        run.learn(signals)
        return run.finish()


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


class OfflineRun(Run[DistillState, list[float]]):
    """One run over packed text."""

    def __init__(self, config: DistillConfig, checkpoint: Checkpoint, directory: RunDirectory):
        self.config = config
        # What programs are compiled for: the same for every run in this process that differs in its directory alone.
        self.compiled_for = replace(config, checkpoint="-", out="-", data=(), drafter_options={})
        self.data, self.held_out = read_data(config, checkpoint).hold_out(config.eval_rows)
        if config.draft_vocabulary and checkpoint.drafter is None:
            ids, _ = self.data.frequent_tokens(config.draft_vocabulary)
            checkpoint = replace(checkpoint, draft_vocabulary=tuple(ids.tolist()))
        model = from_checkpoint(checkpoint, seed=config.seed, mesh=make_mesh(config.mesh))
        check_learning(model, slowly=False)
        config.mesh.require_rows("eval_rows, at least batch_rows of them,", _eval_batch(self.held_out, config))
        super().__init__(checkpoint, model, directory, config.rollback)
        self.seconds = 0.0

    def initial_state(self, params: Params) -> DistillState:
        return init_distill(params, self.config)

    def identity(self) -> RunIdentity:
        rows = {"tokens": self.data.tokens, "mask": self.data.mask, "held out": self.held_out.tokens}
        return identify(self.config, self.checkpoint, self.model.manifest, {"data": hash_tree(rows)})

    def drafting(self) -> tuple[str, int]:
        block = self.model.max_drafts if self.model.drafts_blocks else None
        return "", block or self.config.unroll_steps

    def learned(self) -> dict[str, Any]:
        return self.state.trainable

    def progress_record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "watch": asdict(self.watch)}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        self.seconds = progress["seconds"]

    def work(self, signals: StopSignals) -> None:
        """Updates until the tokens are used up, or a signal asks to stop."""
        config = self.config
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
                self.save()
        self.take_over()

    def finish(self) -> OfflineResult:
        """Write the checkpoint with the trained drafter, and sum up."""
        config, path = self.config, self.write_checkpoint()
        tokens = config.steps * config.batch_rows * config.row_length
        assert self.before is not None
        assert self.after is not None
        return OfflineResult(self.before, self.after, tokens, self.seconds, path, self.model)

    def measure(self) -> tuple[list[float], dict[str, Any]]:
        """Held-out agreement of each unrolled draft with the verifier."""
        values = _evaluate(self.model, self.held_out, self.compiled_for)
        return values["agreement"], values

    def measured(self, record: dict[str, Any]) -> list[float]:
        return record["agreement"]

    def _log_update(self, step: int, metrics: dict[str, jax.Array], updates_per_second: float) -> None:
        """A metrics record; and a rollback if too many updates in a row were non-finite (`rollback.py`)."""
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        tokens = self.config.batch_rows * self.config.row_length
        rate = updates_per_second * tokens
        self.log("train", {"tokens": step * tokens, "tokens_per_second": rate, **values})
        self.directory.log_failed_saves(step)
        self.watch.checks += 1
        self.has_non_finite_updates()


def _evaluate(model: LoadedModel, rows: Packed, config: DistillConfig) -> dict[str, Any]:
    """Held-out means, batch by batch (rows beyond a whole batch are left out)."""
    size = _eval_batch(rows, config)
    parts = []
    for begin in range(0, len(rows.tokens) - size + 1, size):
        tokens = jnp.asarray(rows.tokens[begin : begin + size].astype(np.int32))
        mask = jnp.asarray(rows.mask[begin : begin + size])
        parts.append(distill_metrics(model.definition, model.params, tokens, mask, config=config))
    weights = np.array([part["positions"] for part in parts])
    mean = jax.tree.map(lambda *x: np.average(np.stack(x), axis=0, weights=weights).tolist(), *parts)
    return {"kl": mean["kl"], "agreement": mean["agreement"], "tokens_per_round": expected_tokens(mean["agreement"])}


def _eval_batch(rows: Packed, config: DistillConfig) -> int:
    """Held-out rows that are looked at together."""
    return min(config.batch_rows, len(rows.tokens))


def expected_tokens(agreement: Sequence[float]) -> float:
    """Tokens per round if draft j were accepted with probability `agreement[j]` once those before it were."""
    expected, reached = 1.0, 1.0
    for rate in agreement:
        reached *= rate
        expected += reached
    return expected
