"""What a parity check runs on: weights (given, or tiny random ones), an adapter (given or random), and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.exporting import export_checkpoint
from conversion.importing import import_model
from conversion.kangaroo import write_adapter
from dvi_jax.checkpoint import read_checkpoint
from dvi_jax.config import LlamaConfig
from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.evaluate.spec_bench import read_questions
from dvi_jax.importing import hf
from dvi_jax.importing.layout import HF_NAMES, base_slots
from dvi_jax.importing.safetensors_file import write_safetensors
from dvi_jax.importing.source import open_source
from dvi_jax.importing.weight_files import SAFETENSORS

ADAPTER_SEED = 0
PROMPT_LENGTHS = (1, 5, 14, 24)
QUESTIONS = (
    "What makes the sky blue?",
    "Write three sentences about a lighthouse.",
    "Count from one to twenty.",
)


@dataclass(frozen=True)
class Case:
    """One set of weights in the forms that the implementations read."""

    name: str
    hf: Path  # Hugging Face directory, read by transformers, the reference and upstream
    adapter: Path  # Kangaroo adapter directory, read by the reference and upstream
    checkpoint: Path  # read by JAX
    exit_layer: int
    config: LlamaConfig


def make_case(
    source: Path,
    scratch: Path,
    *,
    adapter: Path | None = None,
    exit_layer: int | None = None,
    checkpoint: Path | None = None,
) -> Case:
    """A case from a Hugging Face directory (or a GGUF file, exported to one first), imported into `scratch`.

    Without `adapter` a random one is made. `checkpoint` is compared in place of a fresh import.
    """
    known = None if checkpoint is None else _checked_exit_layer(checkpoint, adapter, exit_layer)
    directory = source
    if source.is_file():
        import_model(source, scratch / "gguf", dtype="float32")
        directory = scratch / "hf"
        export_checkpoint(scratch / "gguf", directory, "hf")
    if adapter is None:
        adapter = scratch / "adapter"
        write_random_adapter(adapter, directory)
    if checkpoint is None or known is None:
        checkpoint = scratch / "checkpoint"
        known = import_model(source, checkpoint, adapter=adapter, exit_layer=exit_layer).exit_layer
    config = open_source(directory).config
    return Case(source.resolve().name, directory, adapter, checkpoint, known, config)


def _checked_exit_layer(path: Path, adapter: Path | None, exit_layer: int | None) -> int:
    manifest = read_checkpoint(path).manifest
    if adapter is None:
        raise UserError("--checkpoint needs --adapter: the directory the checkpoint's drafter was imported from")
    for name, found, wanted in (("drafter", manifest.drafter, "kangaroo"), ("dtype", manifest.dtype, "float32")):
        if found != wanted:
            raise UserError(f"{path}: its {name} is {found}; parity is defined for {wanted}")
    if exit_layer not in (None, manifest.exit_layer):
        raise UserError(f"--exit-layer {exit_layer}: {path} was imported with exit layer {manifest.exit_layer}")
    return manifest.exit_layer


def write_random_adapter(directory: Path, hf_directory: Path, seed: int = ADAPTER_SEED) -> None:
    """An adapter that drafts from the exit hidden state almost as it is: random attention, the base's final norm."""
    source = open_source(hf_directory)
    config, width = source.config, source.config.hidden_size
    heads = config.num_heads if width % (2 * config.num_heads) == 0 else 1
    norm = np.zeros(width, np.float32)
    for rows, values in source.weights.chunks(HF_NAMES["norm"]):
        norm[rows] = values
    rng = np.random.default_rng(seed)
    drafter = {
        "attn_norm": np.ones(width, np.float32),
        "qkv": rng.standard_normal((3 * width, width), np.float32) / np.float32(np.sqrt(width)),
        "out": rng.standard_normal((width, width), np.float32) * 0.02,
        "norm": norm,
    }
    options = {"num_heads": heads, "num_kv_heads": heads, "rms_norm_eps": config.rms_norm_eps}
    write_adapter(directory, drafter, options, config)


_TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    max_position_embeddings=256,
    eos_token_ids=(2,),
)
TINY_CONFIGS = {
    "tiny": _TINY,
    "tiny, grouped heads, tied": replace(
        _TINY, num_kv_heads=2, num_layers=5, rope_theta=100000.0, tie_word_embeddings=True
    ),
}


def write_tiny_model(directory: Path, config: LlamaConfig, seed: int) -> None:
    """A random Llama as a Hugging Face directory, weighed so that the exit guesses some tokens and not others."""
    # A tied head finds the token itself unless the layers outweigh the embedding.
    scale = {"embed": 0.3 if config.tie_word_embeddings else 1.0, "head": 1.0}
    rng = np.random.default_rng(seed)
    tensors = {}
    for slot in base_slots(config, HF_NAMES):
        noise = rng.standard_normal(slot.shape, np.float32)
        if len(slot.shape) == 1:
            tensors[slot.name] = 1 + 0.1 * noise
        elif slot.path[0] in ("embed", "head"):
            tensors[slot.name] = noise * np.float32(scale[slot.path[0]])
        else:
            tensors[slot.name] = noise * np.float32(0.8 / np.sqrt(slot.shape[1]))
    directory.mkdir(parents=True)
    write_safetensors(directory / SAFETENSORS, tensors)
    (directory / "config.json").write_text(json.dumps(hf.config_to_hf(config, "float32")), encoding="utf-8")


def random_prompts(config: LlamaConfig, max_new_tokens: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 24 random ids, those that leave room for `max_new_tokens`."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    fitting = [prompt for prompt in prompts if len(prompt) + max_new_tokens <= config.context_length]
    if not fitting:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in a context of {config.context_length}"
        )
    return fitting


def chat_prompts(checkpoint: Path, questions: Sequence[str]) -> list[list[int]]:
    """Each question as a user message through the checkpoint's chat template."""
    loaded = read_checkpoint(checkpoint)
    if loaded.tokenizer_json is None:
        raise UserError("the model has no tokenizer: give --prompt-ids instead of --questions")
    tokenizer = Tokenizer.from_checkpoint(loaded)
    return [tokenizer.chat([Message("user", question)]) for question in questions]


def parse_prompt_ids(texts: Sequence[str]) -> list[list[int]]:
    """`["1,2,3", ...]` as lists of ids."""
    try:
        return [[int(token) for token in text.split(",")] for text in texts]
    except ValueError as error:
        raise UserError(f"--prompt-ids must look like 1,2,3, got {' '.join(texts)!r}") from error


def choose_prompts(case: Case, options: Any, max_new_tokens: int) -> list[list[int]]:
    """The prompts that `options.prompt_ids` or `options.questions` name; else chat prompts, without tokenizer ids."""
    if options.prompt_ids:
        return parse_prompt_ids(options.prompt_ids)
    if options.questions is not None:
        questions = read_questions(options.questions)[: options.limit]
        return chat_prompts(case.checkpoint, [question.turns[0] for question in questions])
    if (case.checkpoint / "tokenizer.json").exists():
        return chat_prompts(case.checkpoint, QUESTIONS)
    return random_prompts(case.config, max_new_tokens)
