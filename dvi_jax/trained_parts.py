"""Trained parts apart from their model: keeping them in a directory, and lending a drafter to a checkpoint.

Three forms are read: a checkpoint directory; `drafter/` and `lora/` with a MANIFEST.json (`export --to drafter`); and,
inside a Hugging Face directory, `drafter/config.json` (the manifest's values) with the weights of `drafter/` and
`lora/` as safetensors (`export --to hf`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dvi_jax.checkpoint import (
    DRAFT_VOCABULARY,
    MANIFEST,
    Checkpoint,
    Manifest,
    load_tree,
    read_draft_vocabulary,
    read_manifest,
    save_tree,
)
from dvi_jax.checkpoint import write_manifest as write_manifest_file
from dvi_jax.directories import new_directory
from dvi_jax.errors import UserError
from dvi_jax.identity import hash_base
from dvi_jax.importing.files import read_json_object
from dvi_jax.importing.safetensors_file import SafetensorsFile, write_safetensors
from dvi_jax.importing.tensors import Tree, fill, flatten
from dvi_jax.importing.weight_files import SAFETENSORS
from dvi_jax.settings import from_dict
from dvi_jax.tools import shipped

DRAFTER, LORA, CONFIG = "drafter", "lora", "config.json"
CHECKPOINT = "checkpoint"  # of a run, in its directory


@dataclass(frozen=True)
class TrainedParts:
    """A drafter and LoRA sets (trees of arrays, None where untrained), and the manifest that says whose they are."""

    manifest: Manifest
    drafter: Tree | None
    lora: Tree | None
    vocabulary: tuple[int, ...] | None  # the only tokens that the drafter drafts, None for all


def write_drafter(path: str | Path, checkpoint: Checkpoint) -> None:
    """The trained drafter alone, in bfloat16, with the manifest that says which verifier it belongs to."""
    if checkpoint.drafter is None:
        raise UserError(f"{checkpoint.path} holds no trained drafter")
    half = _map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), checkpoint.drafter)
    with new_directory(path) as partial:
        save_tree(partial / DRAFTER, half)
        if checkpoint.lora:
            save_tree(partial / LORA, checkpoint.lora)
        _write_vocabulary(partial, checkpoint)
        write_manifest_file(partial, _with_hash(checkpoint))


def write_safetensors_parts(directory: Path, checkpoint: Checkpoint) -> None:
    """`drafter/` and `lora/` of a checkpoint into a Hugging Face directory, where it has trained any."""
    if not checkpoint.drafter and not checkpoint.lora:
        return
    _write_part(directory / DRAFTER, checkpoint.drafter, asdict(_with_hash(checkpoint)))
    _write_vocabulary(directory / DRAFTER, checkpoint)
    if checkpoint.lora:
        _write_part(directory / LORA, checkpoint.lora, checkpoint.manifest.lora)


def read_trained_parts(path: Path) -> TrainedParts:
    """The trained parts of a directory in any of the three forms, or of a training run's; else a `UserError`."""
    if not (path / MANIFEST).exists() and (path / CHECKPOINT / MANIFEST).exists():
        path = path / CHECKPOINT
    if (path / MANIFEST).exists():
        lora = load_tree(path / LORA) if (path / LORA).exists() else None
        return TrainedParts(read_manifest(path), load_tree(path / DRAFTER), lora, read_draft_vocabulary(path))
    for directory in (path, path.parent):  # the model's directory, or its drafter/
        parts = read_safetensors_parts(directory)
        if parts is not None and path in (directory, directory / DRAFTER):
            return parts
    raise UserError(f"{path} holds no drafter: neither {MANIFEST} nor {DRAFTER}/{CONFIG} is there")


def read_safetensors_parts(directory: Path) -> TrainedParts | None:
    """What `write_safetensors_parts` wrote into a Hugging Face directory, None where there is nothing of it."""
    config = directory / DRAFTER / CONFIG
    document = read_json_object(config) if config.is_file() else {}
    if "drafter" not in document:
        return None
    manifest, drafter = from_dict(Manifest, document, str(config)), _read_part(directory / DRAFTER)
    return TrainedParts(manifest, drafter, _read_part(directory / LORA), read_draft_vocabulary(directory / DRAFTER))


def with_drafter_from(checkpoint: Checkpoint, path: str | Path, *, any_model: bool = False) -> Checkpoint:
    """`checkpoint` with the drafter of another directory, or of one that comes with the package, by its name.

    The verifier must have the same weights (in any dtype, or in fewer bits), else `UserError`, unless `any_model`: a
    drafter never touches what is decoded, only how fast.
    """
    parts = read_trained_parts(
        Path(path) if Path(path).exists() else shipped("results/drafters", str(path)) or Path(path)
    )
    belongs = _belongs(parts.manifest, checkpoint)
    if not any_model and not belongs:
        raise UserError(
            f"{path}: this drafter was made for {parts.manifest.source}, another model than"
            f" {checkpoint.manifest.source} by their weights; --any-drafter takes it all the same"
        )
    manifest = replace(
        parts.manifest,
        dtype=checkpoint.manifest.dtype,
        source=checkpoint.manifest.source,
        source_sha256=checkpoint.manifest.source_sha256,
        base_sha256=checkpoint.manifest.base_sha256,
        quantisation=checkpoint.manifest.quantisation,
        calibration=parts.manifest.calibration if belongs else (),  # fitted to what another verifier accepts
    )
    return replace(
        checkpoint,
        manifest=manifest,
        drafter=parts.drafter,
        lora=parts.lora,
        draft_vocabulary=parts.vocabulary,
    )


def _belongs(made_for: Manifest, checkpoint: Checkpoint) -> bool:
    """By the hash of the weights, or of what they were rounded from: a model in fewer bits drafts much as it did.

    Drafters from before there was a hash belong by that of the file they came from.
    """
    if made_for.base_sha256:
        return bool(_origins(made_for) & _origins(_with_hash(checkpoint)))
    return made_for.source_sha256 == checkpoint.manifest.source_sha256


def _origins(manifest: Manifest) -> set[str]:
    """Hashes of a model's weights: as they are, and as they were before they were rounded to fewer bits."""
    rounded_from = manifest.quantisation.source_sha256 if manifest.quantisation else ""
    return {manifest.base_sha256, rounded_from} - {""}


def _with_hash(checkpoint: Checkpoint) -> Manifest:
    """The manifest with its weights' hash, which an old checkpoint lacks."""
    manifest = checkpoint.manifest
    return manifest if manifest.base_sha256 else replace(manifest, base_sha256=hash_base(checkpoint.base))


def _write_vocabulary(directory: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.draft_vocabulary:
        text = json.dumps(checkpoint.draft_vocabulary)
        (directory / DRAFT_VOCABULARY).write_text(text, encoding="utf-8")


def _write_part(directory: Path, tree: Tree | None, settings: Mapping[str, Any]) -> None:
    directory.mkdir()
    if tree:
        write_safetensors(directory / SAFETENSORS, dict(flatten(tree)))
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_part(directory: Path) -> Tree | None:
    """Dotted names as a nested tree, in the file's types."""
    if not (directory / SAFETENSORS).is_file():
        return None
    file = SafetensorsFile(directory / SAFETENSORS)
    tree: Tree = {}
    for name, shape in file.shapes.items():
        array = np.empty(shape, file.dtypes[name])
        fill(array, file, name)
        _put(tree, name, array, directory)
    return tree or None


def _put(tree: Tree, name: str, array: np.ndarray, where: Path) -> None:
    *parents, last = name.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"{where}: {name} lies inside another tensor")
    if last in tree:
        raise UserError(f"{where}: {name} is both a tensor and a group of tensors")
    tree[last] = array


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    return {key: _map(function, value) for key, value in tree.items()} if isinstance(tree, dict) else function(tree)
