"""From a Hugging Face directory or a GGUF file to a checkpoint directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion import gguf, hf, kangaroo
from conversion.layout import GGUF_NAMES, HF_NAMES, base_slots
from conversion.tensors import DTYPES, TensorSource, Tree, check_slots, load_tree
from dvi_jax.checkpoint import Manifest, write_checkpoint
from dvi_jax.config import LlamaConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing import tokenizer
from dvi_jax.importing.files import sha256_of

DEFAULT_EXIT_LAYER = 2


@dataclass(frozen=True)
class SourceModel:
    """What a source holds, its weights not yet read."""

    config: LlamaConfig
    weights: TensorSource
    tokenizer_json: str | None
    chat_template: str | None
    special_tokens: dict[str, str]  # by the names that templates know


def import_model(
    source: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    dtype: str = "float32",
    exit_layer: int | None = None,
) -> Manifest:
    """Write the checkpoint directory `out` from `source`, with the Kangaroo adapter of `adapter` if given.

    Weights are stored as `dtype` ("float32" or "bfloat16"). The exit layer defaults to 2. Anything but a
    plain Llama, an exit layer outside 1 .. L-1 or a file that does not belong raises `UserError`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    model = open_source(source)
    exit_layer = _exit_layer(exit_layer, model.config.num_layers)
    drafter, drafter_config = (None, {}) if adapter is None else kangaroo.read_adapter(adapter, model.config, dtype)
    base = load_base(model, dtype)
    manifest = Manifest(
        source=source.resolve().name,
        source_sha256=sha256_of(model.weights.files),
        dtype=dtype,
        exit_layer=exit_layer,
        drafter="exit_head" if drafter is None else "kangaroo",
        drafter_config=drafter_config,
    )
    write_checkpoint(
        out,
        model.config,
        manifest,
        base,
        drafter=drafter,
        tokenizer_json=model.tokenizer_json,
        chat_template=model.chat_template,
        special_tokens=model.special_tokens,
    )
    if model.tokenizer_json is not None:
        tokenizer.report_template(
            Tokenizer(
                model.tokenizer_json,
                model.chat_template,
                bos_token_id=model.config.bos_token_id,
                eos_token_ids=model.config.eos_token_ids,
                special_tokens=model.special_tokens,
            )
        )
    return manifest


def open_source(source: Path) -> SourceModel:
    """Config, tokenizer and weight headers of a directory or GGUF file; weight names are checked later."""
    if source.is_dir():
        config = hf.read_config(source)
        text = tokenizer.from_directory(source, config.vocab_size)
        template, special = tokenizer.chat_template(source), tokenizer.special_tokens(source)
        return SourceModel(config, hf.open_weights(source), text, template, special)
    if not source.is_file():
        raise UserError(f"no model at {source}: expected a Hugging Face directory or a GGUF file")
    model = gguf.GGUFModel(source)
    metadata = model.file.metadata
    template = tokenizer.checked_template(metadata.get("tokenizer.chat_template"), model.label)
    text = tokenizer.from_gguf(metadata, model.config.vocab_size, model.label)
    return SourceModel(model.config, model, text, template, tokenizer.gguf_special_tokens(metadata))


def load_base(model: SourceModel, dtype: str) -> Tree:
    """The fused base tree of a source, as numpy arrays of `dtype`."""
    if isinstance(model.weights, gguf.GGUFModel):
        names, ignored = GGUF_NAMES, gguf.is_ignored
    else:
        names, ignored = HF_NAMES, hf.is_ignored
    head = names["head"]
    tied = model.config.tie_word_embeddings

    def may_be_left(name: str) -> bool:
        return ignored(name) or (tied and name == head)

    slots = check_slots(model.weights, base_slots(model.config, names), may_be_left)
    base = load_tree(model.weights, slots, dtype)
    if tied and head in model.weights.shapes:
        _require_tied(model.weights, head, base["embed"])
    return base


def _require_tied(weights: TensorSource, name: str, embed: np.ndarray) -> None:
    """A tied model may carry its head, but only as the copy that the config says it is."""
    if weights.shapes[name] == embed.shape:
        differing = any(
            not np.array_equal(values.astype(embed.dtype), embed[rows]) for rows, values in weights.chunks(name)
        )
    else:
        differing = True
    if differing:
        raise UserError(f"{weights.label}: the config ties {name} to the embedding, but the two differ")


def _exit_layer(exit_layer: int | None, num_layers: int) -> int:
    if exit_layer is None:
        return min(DEFAULT_EXIT_LAYER, num_layers - 1)
    if not 1 <= exit_layer < num_layers:
        raise UserError(f"--exit-layer must be in 1..{num_layers - 1} for {num_layers} layers, got {exit_layer}")
    return exit_layer
