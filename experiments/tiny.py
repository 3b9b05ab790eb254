"""A tiny model that speaks bytes, questions for it, and the settings of a run on both: faults show in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dvi_jax.checkpoint import Manifest, write_checkpoint
from dvi_jax.config import DataConfig, DecodeConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from dvi_jax.model.llama import random_base
from dvi_jax.presets import TINY

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]
WORDS = ("tree", "moon", "river", "stone", "cloud", "bird")


def write_tiny_run(
    folder: Path, *, questions: int, seed: int = 0, save_every: int = 10, layers: int = TINY.num_layers
) -> TrainConfig:
    """A random checkpoint and `questions` questions under `folder`, and the settings of a run `folder/run` on them."""
    write_tiny_model(folder / "model", seed=seed, layers=layers)
    write_questions(folder / "questions.jsonl", questions)
    return TrainConfig(
        checkpoint=str(folder / "model"),
        out=str(folder / "run"),
        seed=seed,
        prompts=questions,
        rollout_batch=2,
        replayed_windows=2,
        updates_per_rollout=2,
        positions_per_update=32,
        replay_capacity=8,
        eval_every=50,
        save_every=save_every,
        data=DataConfig((str(folder / "questions.jsonl"),), "first", 48, 0.02, 4),
        decode=DecodeConfig(draft_steps=2, max_new_tokens=8),
        drafter_options={"rank": 4, "alpha": 4.0},
        objective=ObjectiveConfig(warmup=20, ramp=40),
        optimizer=OptimizerConfig(lora_lr=1e-2, head_lr=1e-2),
    )


def write_questions(path: Path, count: int) -> None:
    """Different questions, one conversation each."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            question = f"{WORDS[index % 6]} {WORDS[index // 6 % 6]} {index}?"
            file.write(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")


def write_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    context: int = 128,
    layers: int = TINY.num_layers,
    chat_template: str | None = None,
) -> None:
    """A random checkpoint that speaks bytes, with room for `context` tokens."""
    config = replace(
        TINY,
        vocab_size=258,
        num_layers=layers,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_ids=(1,),
    )
    manifest = Manifest(source="random", source_sha256="0" * 64, dtype="float32", exit_layer=1)
    base = random_base(config, jax.random.key(seed + 3), std=0.15)
    write_checkpoint(path, config, manifest, base, tokenizer_json=byte_tokenizer_json(), chat_template=chat_template)


def byte_tokenizer_json() -> str:
    """A byte-level tokenizer: ids 0 and 1 are the special tokens, every other id is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer.to_str()
