"""The checkpoint directory: what is in it, writing it whole or not at all, and reading it with every shape checked.

    config.json  tokenizer.json  chat_template.jinja  base/  drafter/  lora/  MANIFEST.json

`base/`, `drafter/` and `lora/` are orbax checkpoints of plain nested dicts with string keys and restore without this
package. Training snapshots (optimiser, replay, stream position) are `learn/snapshot.py`'s.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from dvi_jax.config import LlamaConfig, from_dict
from dvi_jax.errors import UserError
from dvi_jax.model.llama import base_shapes

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Manifest:
    """What the arrays are and where they came from. `verifier` names the model that "lossless" is relative to."""

    source: str
    source_sha256: str
    dtype: str
    exit_layer: int
    drafter: str = "exit_head"
    drafter_config: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    training_step: int = 0
    verifier: str = "base"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise UserError(
                f"MANIFEST.json: format_version {self.format_version} is not supported; this reads {FORMAT_VERSION}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"MANIFEST.json: dtype must be float32 or bfloat16, got {self.dtype!r}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; every array is numpy."""

    path: Path
    config: LlamaConfig
    manifest: Manifest
    base: dict[str, Any]
    drafter: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    tokenizer_json: str | None = None
    chat_template: str | None = None


def write_checkpoint(
    path: str | Path,
    config: LlamaConfig,
    manifest: Manifest,
    base: dict[str, Any],
    *,
    drafter: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    tokenizer_json: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a checkpoint directory at `path`, which must not exist or be empty; a failure leaves nothing there."""
    texts = {
        "config.json": json.dumps(config.to_json(), indent=1),
        "MANIFEST.json": json.dumps(asdict(manifest), indent=1),
        "tokenizer.json": tokenizer_json,
        "chat_template.jinja": chat_template,
    }
    with new_directory(path) as partial:
        for name, text in texts.items():
            if text is not None:
                (partial / name).write_text(text, encoding="utf-8")
        for name, tree in (("base", base), ("drafter", drafter), ("lora", lora)):
            if tree:
                save_tree(partial / name, tree)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint directory; a missing file, unknown key or wrong shape raises `UserError` naming the first."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: not a directory (make one with: python -m conversion import)")
    if not (path / "MANIFEST.json").is_file():
        raise UserError(f"{path} is no checkpoint: MANIFEST.json is missing (see: python -m conversion import --help)")
    config = LlamaConfig.from_json(read_json(path / "config.json"), str(path / "config.json"))
    manifest = from_dict(Manifest, read_json(path / "MANIFEST.json"), str(path / "MANIFEST.json"))
    base = load_tree(path / "base")
    check_shapes(base, base_shapes(config), str(path / "base"))
    return Checkpoint(
        path,
        config,
        manifest,
        base,
        load_tree(path / "drafter") if (path / "drafter").exists() else None,
        load_tree(path / "lora") if (path / "lora").exists() else None,
        _read_optional(path / "tokenizer.json"),
        _read_optional(path / "chat_template.jinja"),
    )


def write_drafter(path: str | Path, checkpoint: Checkpoint) -> None:
    """The trained drafter alone, in bfloat16, with the manifest that says which verifier it belongs to."""
    if checkpoint.drafter is None:
        raise UserError(f"{checkpoint.path} holds no trained drafter")
    half = _map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), checkpoint.drafter)
    with new_directory(path) as partial:
        (partial / "MANIFEST.json").write_text(json.dumps(asdict(checkpoint.manifest), indent=1), encoding="utf-8")
        save_tree(partial / "drafter", half)
        if checkpoint.lora:
            save_tree(partial / "lora", checkpoint.lora)


def with_drafter_from(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """`checkpoint` with the drafter of another directory: a checkpoint's, or one that `write_drafter` made.

    The verifier must be the same model (by the source's sha256, at any dtype), else `UserError`.
    """
    path = Path(path)
    manifest = from_dict(Manifest, read_json(path / "MANIFEST.json"), str(path / "MANIFEST.json"))
    if manifest.source_sha256 != checkpoint.manifest.source_sha256:
        raise UserError(
            f"{path}: this drafter was made for {manifest.source}, another model than {checkpoint.manifest.source}"
        )
    return replace(
        checkpoint,
        manifest=replace(manifest, dtype=checkpoint.manifest.dtype),
        drafter=load_tree(path / "drafter"),
        lora=load_tree(path / "lora") if (path / "lora").exists() else None,
    )


def rewrite_checkpoint(checkpoint: Checkpoint, path: str | Path, **changes: Any) -> None:
    """Write `checkpoint` at `path` with fields replaced, e.g. `manifest=`, `drafter=`, `lora=`."""
    new = replace(checkpoint, **changes)
    write_checkpoint(
        path,
        new.config,
        new.manifest,
        new.base,
        drafter=new.drafter,
        lora=new.lora,
        tokenizer_json=new.tokenizer_json,
        chat_template=new.chat_template,
    )


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path`, renamed to it when the block ends well, removed otherwise."""
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another path or remove it first")
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """Save a nested dict of arrays as one orbax checkpoint; integer keys become strings."""
    # Synchronous, uncompressed and without orbax's copy of host arrays: the write then takes no memory of its own.
    handlers = ocp.type_handlers
    copies = "deepcopy_host_arrays" in inspect.signature(handlers.NumpyHandler).parameters  # orbax 0.12.4 never copies
    numpy_handler = handlers.NumpyHandler(**({"deepcopy_host_arrays": False} if copies else {}))
    registry = handlers.create_type_handler_registry((np.ndarray, numpy_handler), (jax.Array, handlers.ArrayHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.PyTreeSave(string_keys(tree)))


def load_tree(path: Path) -> dict[str, Any]:
    """Read what `save_tree` wrote, as numpy, whatever devices it was written from."""
    if not path.is_dir():
        raise UserError(f"{path} is missing from the checkpoint")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            structure = checkpointer.metadata(path.absolute()).item_metadata.tree
            as_numpy = _map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            return checkpointer.restore(path.absolute(), restore_args=as_numpy)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check_shapes(tree: dict[str, Any], shapes: dict[str, Any], where: str) -> None:
    """Raise `UserError` naming the first array of `tree` that is missing, unknown, or not of its shape in `shapes`."""
    found, wanted = dict(_flatten(tree)), dict(_flatten(shapes))
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{where}: {name} is missing")
        if tuple(found[name].shape) != tuple(shape):
            raise UserError(f"{where}: {name} has shape {tuple(found[name].shape)}, expected {tuple(shape)}")
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise UserError(f"{where}: unexpected array {unknown[0]}")


def read_json(path: Path) -> Any:
    """Parse a JSON file; missing or malformed raises `UserError` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # malformed JSON or UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from error


def string_keys(tree: Any) -> Any:
    """The same nested dict with every key a string (orbax keeps no other kind)."""
    if isinstance(tree, dict):
        return {str(key): string_keys(value) for key, value in tree.items()}
    return tree


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _read_optional(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
