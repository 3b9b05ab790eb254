"""From a checkpoint to an orbax export that needs none of our code, or to a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion import kangaroo
from dvi_jax.checkpoint import SPECIAL_TOKENS, Checkpoint, save_tree
from dvi_jax.directories import new_directory, require_new
from dvi_jax.errors import UserError, notice
from dvi_jax.identity import hash_base
from dvi_jax.importing import hf
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.importing.layout import HF_NAMES, base_slots
from dvi_jax.importing.safetensors_file import write_safetensors
from dvi_jax.importing.tensors import get_path
from dvi_jax.importing.tokenizer import token_text
from dvi_jax.importing.weight_files import SAFETENSORS, SAFETENSORS_INDEX
from dvi_jax.model.lora import merge_lora
from dvi_jax.model.quantised import Quantised
from dvi_jax.trained_parts import write_drafter, write_safetensors_parts

MAX_SHARD_BYTES = 5_000_000_000
_TEXTS = ("config.json", "tokenizer.json", "chat_template.jinja", SPECIAL_TOKENS)


def export_checkpoint(source: Path, out: Path, kind: str, *, merge: bool = False) -> None:
    """Write the checkpoint directory `source` as `kind` (a key of `KINDS`) into the new directory `out`.

    `merge` folds lora_D into the base weights first.
    """
    require_new(out)
    checkpoint = open_checkpoint(source)
    KINDS[kind](merge_verifier(checkpoint) if merge else checkpoint, out)


def merge_verifier(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with lora_D folded into the base weights; lora_S stays apart, since the verifier never has it."""
    lora = dict(checkpoint.lora or {})
    if "lora_d" not in lora:
        raise UserError(f"{checkpoint.path} has no lora_D to merge")
    options = checkpoint.manifest.lora
    scale = options.get("alpha_d", options["rank_d"]) / options["rank_d"]
    base = merge_lora(checkpoint.base, lora.pop("lora_d")["llama"], scale)
    manifest = replace(checkpoint.manifest, lora={**options, "rank_d": 0}, base_sha256=hash_base(base))
    return replace(checkpoint, base=base, lora=lora or None, manifest=manifest)


def export_orbax(checkpoint: Checkpoint, out: Path) -> None:
    """`weights/`, one orbax tree {"base", "drafter", "lora"} of the parts that exist, and the texts.

    `orbax.checkpoint.StandardCheckpointer().restore(out / "weights")` reads it.
    """
    parts = {"base": checkpoint.base, "drafter": checkpoint.drafter, "lora": checkpoint.lora}
    with new_directory(out) as directory:
        for name in _TEXTS:
            if (checkpoint.path / name).exists():
                (directory / name).write_bytes((checkpoint.path / name).read_bytes())
        _write_json(directory / "MANIFEST.json", asdict(checkpoint.manifest))
        save_tree(directory / "weights", {name: tree for name, tree in parts.items() if tree})


def export_hf(checkpoint: Checkpoint, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """A Hugging Face directory: config, safetensors (shards of `max_shard_bytes`), tokenizer, chat template.

    LoRA sets stay apart in `lora/` and the drafter in `drafter/`, from where an import takes them again; one of the
    kind kangaroo is in `adapter/` too, as upstream reads it. To merge LoRA into the base, pass a checkpoint whose base
    is merged and whose `lora` is None.
    """
    config, manifest = checkpoint.config, checkpoint.manifest
    if manifest.quantisation is not None:
        notice(f"{out}: matrices kept in {manifest.quantisation.weights} are written as {manifest.dtype}")
    with new_directory(out) as directory:
        _write_json(directory / "config.json", hf.config_to_hf(config, manifest.dtype))
        _write_json(directory / "generation_config.json", _generation_config(checkpoint))
        _write_weights(directory, dict(_hf_tensors(checkpoint)), max_shard_bytes)
        _write_tokenizer(directory, checkpoint)
        write_safetensors_parts(directory, checkpoint)
        if checkpoint.drafter and manifest.drafter == "kangaroo":
            kangaroo.write_adapter(directory / "adapter", checkpoint.drafter, manifest.drafter_config, config)


def _hf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    dtype = checkpoint.base["embed"].dtype
    for slot in base_slots(checkpoint.config, HF_NAMES):
        weight = get_path(checkpoint.base, slot.path)
        if isinstance(weight, dict):
            yield slot.name, Quantised.of(weight).rows(slot.rows).dequantised(dtype)
        else:
            yield slot.name, weight[slot.rows]


def _write_weights(directory: Path, tensors: dict[str, np.ndarray], max_shard_bytes: int) -> None:
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(directory / SAFETENSORS, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in tensors.values())
    _write_json(directory / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(tensors: Mapping[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, array in tensors.items():
        if shards[-1] and used + array.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = array
        used += array.nbytes
    return shards


def _write_tokenizer(directory: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.tokenizer_json is None:
        return
    (directory / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
    config, eos = checkpoint.config, checkpoint.config.eos_token_ids
    ids = {"bos_token": config.bos_token_id, "eos_token": eos[0] if eos else None}
    # What tokenizer_config.json names is matched in texts, so it names what tokenizer.json matches anyway.
    listed = {token["id"] for token in json.loads(checkpoint.tokenizer_json).get("added_tokens") or []}
    special = {name: token_text(checkpoint.tokenizer_json, index) for name, index in ids.items() if index in listed}
    special |= {name: text or None for name, text in (checkpoint.special_tokens or {}).items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without it, transformers 4.33.3 also makes token_type_ids, which a Llama's `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
        "model_max_length": config.context_length,
        "chat_template": checkpoint.chat_template,
    }
    _write_json(directory / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    eos = list(checkpoint.config.eos_token_ids)
    settings = {
        "bos_token_id": checkpoint.config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
    }
    return {key: value for key, value in settings.items() if value not in (None, [])}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# "drafter": what --drafter-from takes.
KINDS = {
    "orbax": export_orbax,
    "hf": export_hf,
    "drafter": lambda checkpoint, out: write_drafter(out, checkpoint),
}
