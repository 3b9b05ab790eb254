"""What a source of weights holds, whatever its format: config, tokenizer, chat template, and the base tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi_jax.checkpoint import MANIFEST
from dvi_jax.config import LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.importing import gguf, hf, tokenizer
from dvi_jax.importing.layout import GGUF_NAMES, HF_NAMES, YI_NAMES, base_slots
from dvi_jax.importing.quantising import QuantisedBase, load_quantised
from dvi_jax.importing.tensors import Slot, TensorSource, Tree, check_slots, load_tree
from dvi_jax.importing.weight_files import open_weights
from dvi_jax.quantisation import Quantisation


@dataclass(frozen=True)
class SourceModel:
    """What a source holds, its weights not yet read."""

    config: LlamaConfig
    weights: TensorSource
    tokenizer_json: str | None
    chat_template: str | None
    special_tokens: dict[str, str]  # by the names that templates know


def open_source(source: Path) -> SourceModel:
    """Config, tokenizer and weight headers of a directory or GGUF file; weight names are checked later."""
    if source.is_dir():
        files = sorted(source.glob("*.gguf"))
        if files and not (source / "config.json").exists():
            raise UserError(f"{source} holds GGUF files: name the one to use, such as {files[0].name}")
        if (source / MANIFEST).exists():
            raise UserError(f"{source} is a checkpoint, imported already: give the model that it was made from")
        config = hf.read_config(source)
        text = tokenizer.from_directory(source, config.vocab_size)
        template, special = tokenizer.chat_template(source), tokenizer.special_tokens(source)
        return SourceModel(config, open_weights(source), text, template, special)
    if not source.is_file():
        raise UserError(
            f"no model at {source}: expected a Hugging Face directory, a GGUF file, or the name of a repository in the"
            " Hugging Face cache"
        )
    model = gguf.GGUFModel(source)
    metadata = model.file.metadata
    template = tokenizer.gguf_chat_template(metadata, model.label)
    text = tokenizer.from_gguf(metadata, model.config.vocab_size, model.label)
    return SourceModel(model.config, model, text, template, tokenizer.gguf_special_tokens(metadata))


def load_base(model: SourceModel, dtype: str) -> Tree:
    """The base tree of a source, as numpy arrays of `dtype`."""
    slots, head = _checked_slots(model)
    base = load_tree(model.weights, slots, dtype)
    if head is not None:
        _require_tied(model.weights, head, base["embed"])
    return base


def load_quantised_base(model: SourceModel, dtype: str, how: Quantisation) -> QuantisedBase:
    """The base tree of a source with matrices in fewer bits; what is none of them as numpy arrays of `dtype`."""
    slots, head = _checked_slots(model)
    base = load_quantised(model.weights, slots, dtype, how, model.config.tie_word_embeddings)
    if head is not None:
        _require_tied(model.weights, head, base.tree["embed"])
    return base


def _checked_slots(model: SourceModel) -> tuple[list[Slot], str | None]:
    """Which tensors become what, and the head that must be the embedding's copy, where a tied model has one."""
    is_gguf = isinstance(model.weights, gguf.GGUFModel)
    names, ignored = (GGUF_NAMES, gguf.is_ignored) if is_gguf else (HF_NAMES, hf.is_ignored)
    head, shapes = names["head"], model.weights.shapes
    if YI_NAMES["attn_norm"].format(i=0) in shapes:
        names = {**names, **YI_NAMES}
    tied = model.config.tie_word_embeddings
    if tied and head in shapes and names["embed"] not in shapes:
        names = {**names, "embed": head}  # some tools save of two tied tensors the last one only

    def may_be_left(name: str) -> bool:
        return ignored(name) or (tied and name == head)

    slots = check_slots(model.weights, base_slots(model.config, names), may_be_left)
    return slots, head if tied and head in shapes and names["embed"] != head else None


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
