"""Distillations side by side in one process: drafters, losses, budgets and seeds at equal tokens of the same text.

`python -m dvi_jax.train` compiles its update for each run, since budget and seed are part of the settings. Here they
are not part of the program: a drafter and a loss are compiled once, however often they are trained. Letters as in
`learn/distill.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dvi_jax.checkpoint import Checkpoint
from dvi_jax.config import DecodeConfig, DistillConfig, DistillLoss, load_train_config
from dvi_jax.data.conversations import Message
from dvi_jax.decode.acceptance import Acceptance, measure_acceptance
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.plan import Plan
from dvi_jax.errors import ArgumentParser, UserError, at_least_one
from dvi_jax.evaluate.spec_bench import read_questions
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.distill import distill_gradient, distill_metrics, learning_rate
from dvi_jax.learn.fast_update import Trainable, with_trainable
from dvi_jax.learn.new_drafter import matching_or_new_drafter
from dvi_jax.learn.offline import read_data
from dvi_jax.learn.optimizer import guarded
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel, from_checkpoint
from dvi_jax.model.speculative_llama import Definition, Params


@dataclass(frozen=True)
class Bench:
    """What all runs of a comparison share."""

    config: DistillConfig
    checkpoint: Checkpoint  # the verifier's; its drafter is not used
    text: Packed  # to learn from
    held_out: Packed  # rows that nobody learns from
    prompts: list[list[int]]  # to decode, all of them as one batch

    def train(self, kind: str, options: dict[str, Any], tokens: int, seed: int, **changes: Any) -> LoadedModel:
        """A model with a new drafter after so many tokens; `changes` are settings of the run.

        The seed draws the drafter's first weights and the order of the rows.
        """
        config = replace(self.config, drafter=kind, drafter_options=options, tokens=tokens, seed=seed, **changes)
        new = matching_or_new_drafter(replace(self.checkpoint, drafter=None), kind, options, config.exit_layer)
        model = from_checkpoint(new, seed=seed)
        trainable: Trainable = {"drafter": model.params.drafter, "lora_s": model.params.lora_s}
        moments = _optimizer(config).init(trainable)
        batches = self.text.batches(config.batch_rows, seed)
        for rate in np.asarray(learning_rate(config)(np.arange(config.steps)), np.float32):
            trainable, moments = _update(
                model.definition, model.params, trainable, moments, *next(batches), rate, config=compiled_for(config)
            )
        return model.with_params(with_trainable(model.params, trainable))

    def agreement(self, model: LoadedModel) -> list[float]:
        """How often each unrolled draft has the verifier's token first, over the held-out rows: [J]."""
        size, parts = self.config.batch_rows, []
        config = compiled_for(replace(self.config, loss=DistillLoss()))
        for begin in range(0, len(self.held_out.tokens) - size + 1, size):
            rows = slice(begin, begin + size)
            tokens, mask = self.held_out.tokens[rows].astype(np.int32), self.held_out.mask[rows]
            parts.append(distill_metrics(model.definition, model.params, tokens, mask, config=config))
        weights = [float(part["positions"]) for part in parts]
        return np.average([np.asarray(part["agreement"]) for part in parts], axis=0, weights=weights).tolist()

    def decode(self, model: LoadedModel, drafts: int, new_tokens: int) -> Acceptance:
        """Acceptance of chains of so many drafts, or of blocks of as many as the drafter has."""
        drafts = min(drafts, model.max_drafts or drafts)
        plan = Plan("block" if model.drafts_blocks else "chain", drafts)
        settings = DecodeConfig(draft_steps=drafts, plan=str(plan), max_new_tokens=new_tokens)
        return measure_acceptance(generate_batch(model, self.prompts, settings)[0])


def compiled_for(config: DistillConfig) -> DistillConfig:
    """The settings that a program depends on; the rest is the same for all."""
    return replace(config, checkpoint="-", out="-", data=(), drafter_options={}, tokens=1, seed=0)


def add_arguments(parser: ArgumentParser, prompts: int) -> None:
    """The options of a comparison."""
    parser.add_argument("--config", required=True, help="a distill config: data, batch, rate, exit layer")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--questions", required=True, help="Spec-Bench questions, whose first turns are decoded")
    parser.add_argument("--prompts", type=at_least_one, default=prompts, help="questions to decode, as one batch")
    parser.add_argument("--longest-prompt", type=at_least_one, default=128, help="longer questions are left out")
    parser.add_argument("--draft-steps", type=at_least_one, default=4)
    parser.add_argument("--new-tokens", type=at_least_one, default=96)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")


def open_bench(options: argparse.Namespace) -> Bench:
    """What the options name; `UserError` for another trainer's settings, or questions that are all too long."""
    config = load_train_config(options.config, options.set)
    if not isinstance(config, DistillConfig):
        raise UserError(f"{options.config} must have trainer: distill")
    checkpoint = open_checkpoint(config.checkpoint)
    text, held_out = read_data(config, checkpoint).hold_out(config.eval_rows)
    if len(held_out.tokens) < config.batch_rows:
        raise UserError(f"eval_rows is {config.eval_rows}: at least batch_rows={config.batch_rows} are needed")
    return Bench(config, checkpoint, text, held_out, _first_turns(checkpoint, options))


def _first_turns(checkpoint: Checkpoint, options: argparse.Namespace) -> list[list[int]]:
    tokenizer = from_checkpoint(checkpoint).need_tokenizer(f"{checkpoint.path} has no tokenizer")
    asked = (tokenizer.chat([Message("user", question.turns[0])]) for question in read_questions(options.questions))
    short = [prompt for prompt in asked if len(prompt) <= options.longest_prompt]
    # Questions come by category: some of each.
    chosen = short[:: max(len(short) // options.prompts, 1)][: options.prompts]
    if len(chosen) < options.prompts:
        raise UserError(f"{options.questions} has {len(short)} questions of at most {options.longest_prompt} tokens")
    return chosen


def _optimizer(config: DistillConfig) -> optax.GradientTransformation:
    """That of a distillation, at a learning rate of 1."""
    return guarded(optax.adamw(1.0, b2=0.95, weight_decay=config.weight_decay), config.clip_norm)


@partial(jax.jit, static_argnames=("definition", "config"), donate_argnames="moments")
def _update(
    definition: Definition,
    params: Params,
    trainable: Trainable,
    moments: optax.OptState,
    tokens: jax.Array,
    mask: jax.Array,
    rate: jax.Array,
    *,
    config: DistillConfig,
) -> tuple[Trainable, optax.OptState]:
    """One update at learning rate `rate`; its number is not part of the program, as in `distill_step`."""
    gradient, _ = distill_gradient(definition, params, trainable, tokens, mask, config)
    updates, moments = _optimizer(config).update(gradient, moments, trainable)
    return optax.apply_updates(trainable, jax.tree.map(lambda update: rate * update, updates)), moments


def range_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range, for people."""
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
