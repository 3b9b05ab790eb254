"""Offline training, the whole run: distillation over packed text, with metrics, snapshots and a final checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import Checkpoint, read_checkpoint, rewrite_checkpoint
from dvi_jax.config import DistillConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import from_first_question
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.learn.distill import distill_metrics, distill_step, init_distill
from dvi_jax.learn.fast_update import with_trainable
from dvi_jax.learn.metrics import MetricsLog
from dvi_jax.learn.packing import Packed, load_packed, pack
from dvi_jax.learn.snapshot import Snapshots, refuse_earlier_run
from dvi_jax.load import LoadedModel, from_checkpoint, trained_parts

Report = Callable[[str, dict[str, Any]], None]


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
    """Run a distillation, or go on with one (`resume`). `report` is called with every metrics record."""
    out = Path(config.out)
    if not resume:
        refuse_earlier_run(out)
    checkpoint = with_drafter(
        read_checkpoint(config.checkpoint), config.drafter, config.exit_layer, config.shallow_rank
    )
    data = read_data(config, checkpoint)
    model = from_checkpoint(checkpoint, seed=config.seed)
    metrics = MetricsLog(out / "metrics.jsonl")
    with Snapshots(out / "snapshots", config.keep_checkpoints) as snapshots:
        return _run(config, checkpoint, model, data, snapshots, metrics, resume, report)


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


def _run(
    config: DistillConfig,
    checkpoint: Checkpoint,
    model: LoadedModel,
    data: Packed,
    snapshots: Snapshots,
    metrics: MetricsLog,
    resume: bool,
    report: Report,
) -> DistillResult:
    held_out = Packed(data.tokens[-config.eval_rows :], data.mask[-config.eval_rows :])
    data = Packed(data.tokens[: -config.eval_rows], data.mask[: -config.eval_rows])
    state, seconds = init_distill(model.params, config), 0.0

    def log(kind: str, values: dict[str, Any]) -> None:
        record = {"kind": kind, "step": int(state.step), **values}
        metrics.append(record)
        report(kind, record)

    def evaluate() -> list[float]:
        values = _evaluate(model.with_params(with_trainable(model.params, state.trainable)), held_out, config)
        log("eval", values)
        return values["agreement"]

    restored = snapshots.restore(state) if resume else None
    if restored is not None:
        state, progress = restored
        seconds = progress["seconds"]
    kept = metrics.rewind(int(state.step) if restored is not None else -1)
    before = kept[0]["agreement"] if kept else evaluate()
    began, log_began, logged = time.perf_counter() - seconds, time.perf_counter(), int(state.step)
    batches = data.batches(config.batch_rows, config.seed, skip=int(state.step))
    for step in range(int(state.step) + 1, config.steps + 1):
        tokens, mask = next(batches)
        state, values = distill_step(model.graphdef, model.params, state, tokens, mask, config=config)
        if step % config.log_every == 0 or step == config.steps:
            values = {name: np.asarray(value).tolist() for name, value in values.items()}
            now = time.perf_counter()
            rate = (step - logged) * config.batch_rows * config.row_length / (now - log_began)
            log_began, logged = now, step
            log("train", {"tokens": step * config.batch_rows * config.row_length, "tokens_per_second": rate, **values})
        if step % config.save_every == 0 or step == config.steps:
            metrics.flush()
            snapshots.save(state, {"seconds": time.perf_counter() - began})
    seconds = time.perf_counter() - began
    after = evaluate()
    model = model.with_params(with_trainable(model.params, state.trainable))
    path = Path(config.out) / "checkpoint"
    manifest = replace(model.manifest, training_step=int(state.step))
    rewrite_checkpoint(checkpoint, path, manifest=manifest, **trained_parts(model.params))
    return DistillResult(before, after, config.steps * config.batch_rows * config.row_length, seconds, path, model)


def _evaluate(model: LoadedModel, rows: Packed, config: DistillConfig) -> dict[str, Any]:
    """Held-out means, batch by batch (rows beyond a whole batch are left out)."""
    size = min(config.batch_rows, len(rows.tokens))
    parts = []
    for begin in range(0, len(rows.tokens) - size + 1, size):
        tokens = jnp.asarray(rows.tokens[begin : begin + size].astype(np.int32))
        mask = jnp.asarray(rows.mask[begin : begin + size])
        parts.append(distill_metrics(model.graphdef, model.params, tokens, mask, config=config))
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
