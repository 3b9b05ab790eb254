"""The checkpoint directory: what is in it, writing it whole or not at all, and reading it with every shape checked.

    config.json  tokenizer.json  chat_template.jinja  special_tokens_map.json  draft_vocabulary.json
    base/  drafter/  lora/  MANIFEST.json

`base/`, `drafter/` and `lora/` are orbax checkpoints of plain nested dicts with string keys and restore without this
package. MANIFEST.json also holds the SHA-256 of every file, which reading verifies; take its `checksums` out to use
files that were changed on purpose. Training snapshots (optimiser, replay, stream position) are `learn/snapshot.py`'s.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
import orbax.checkpoint as ocp

from dvi_jax.archives import MOST_INFLATED, SMALL
from dvi_jax.config import MOST_DRAFTS, LlamaConfig
from dvi_jax.directories import hash_files, link_files, new_directory, require_space, verify_files
from dvi_jax.errors import UserError
from dvi_jax.model.llama import base_shapes
from dvi_jax.quantisation import Quantisation, with_wholes
from dvi_jax.settings import MOST_MESSAGE, from_dict, require, require_count
from dvi_jax.stored_array import one_process, read_stored, reader, stored_tree
from dvi_jax.text_files import read_json, read_text

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
SPECIAL_TOKENS = "special_tokens_map.json"
DRAFT_VOCABULARY = "draft_vocabulary.json"  # a list of token ids
DTYPES = ("float32", "bfloat16")
LORA_OPTIONS = {"rank_s", "rank_d", "alpha_s", "alpha_d"}
MOST_OPTION = 4096  # a rank, a number of heads: a manifest alone must not make anything allocate
# What orbax makes of a directory that is something else.
UNREADABLE = (ValueError, OSError, KeyError, AttributeError, TypeError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the arrays are and where they came from. `verifier` names the model that "lossless" is relative to.

    `base_sha256` is `identity.hash_base` of the base weights; checkpoints from before there was one have none.
    `calibration`: temperatures of the drafts of a round (`learn/calibration.py`), none where nothing was fitted.
    `run_digest` is that of the run that trained it (`learn/run_identity.py`), and `held_out_fraction` the share of
    questions that no run has trained its drafter on; `plan` and `draft_steps` are how it drafted in training. Where
    nothing was trained or recorded, "" and 0.
    """

    source: str
    source_sha256: str
    dtype: str
    exit_layer: int
    drafter: str = "exit_head"
    drafter_config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    training_step: int = 0
    verifier: str = "base"
    base_sha256: str = ""
    run_digest: str = ""
    held_out_fraction: float = 0.0
    calibration: tuple[float, ...] = ()
    plan: str = ""
    draft_steps: int = 0
    quantisation: Quantisation | None = None  # None: every weight is of `dtype`
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise UserError(
                f"MANIFEST.json: format_version {self.format_version} is not supported; this reads {FORMAT_VERSION}"
            )
        require(self.dtype in DTYPES, f"{MANIFEST}: dtype", self.dtype, "float32 or bfloat16")
        unknown = sorted(map(str, self.lora.keys() - LORA_OPTIONS))
        require(not unknown, f"{MANIFEST}: lora", unknown, f"an object with {', '.join(sorted(LORA_OPTIONS))}")
        for name, value in (self.lora | self.drafter_config).items():
            if isinstance(value, (int, float)):
                require(0 <= value <= MOST_OPTION, f"{MANIFEST}: {name}", value, f"between 0 and {MOST_OPTION}")
        for name, value in self.lora.items():
            whole = name.startswith("rank")
            fits = type(value) is int or (not whole and (value is None or type(value) is float))
            require(fits, f"{MANIFEST}: {name}", value, "a whole number" if whole else "a number")
        require_count(f"{MANIFEST}: exit_layer", self.exit_layer, 0)
        require_count(f"{MANIFEST}: training_step", self.training_step, 0)
        require_count(f"{MANIFEST}: draft_steps", self.draft_steps, 0, MOST_DRAFTS)
        share = self.held_out_fraction
        require(0 <= share < 1, f"{MANIFEST}: held_out_fraction", share, "at least 0 and below 1")
        fits = len(self.calibration) <= MOST_DRAFTS and all(0.01 <= t <= 100 for t in self.calibration)
        require(fits, f"{MANIFEST}: calibration", self.calibration, f"at most {MOST_DRAFTS} numbers from 0.01 to 100")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; every array is numpy, those of a lazily read base are still on the disk."""

    path: Path
    config: LlamaConfig
    manifest: Manifest
    base: dict[str, Any]
    drafter: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    tokenizer_json: str | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] | None = None  # what templates know as `eos_token` and so on; "" for none
    draft_vocabulary: tuple[int, ...] | None = None  # the only tokens that its drafter drafts, None for all


class Changes(TypedDict, total=False):
    """The fields that `rewrite_checkpoint` may replace."""

    manifest: Manifest
    drafter: dict[str, Any] | None
    lora: dict[str, Any] | None
    draft_vocabulary: tuple[int, ...] | None


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
    special_tokens: dict[str, str] | None = None,
    draft_vocabulary: tuple[int, ...] | None = None,
    base_from: Path | None = None,
) -> None:
    """Write a checkpoint directory at `path`, which must not exist or be empty; a failure leaves nothing there.

    `base_from`: a checkpoint with the very same base weights, whose files are then shared where the file system can.
    `UserError` for a drafter or LoRA sets with numbers that are not finite.
    """
    check_finite({"drafter": drafter, "lora": lora}, str(path))
    texts = {
        "config.json": json.dumps(config.to_json(), indent=1),
        "tokenizer.json": tokenizer_json,
        "chat_template.jinja": chat_template,
        SPECIAL_TOKENS: json.dumps(special_tokens, ensure_ascii=False, indent=1) if special_tokens else None,
        DRAFT_VOCABULARY: json.dumps(draft_vocabulary) if draft_vocabulary else None,
    }
    with new_directory(path) as partial:
        for name, text in texts.items():
            if text is not None:
                (partial / name).write_text(text, encoding="utf-8")
        is_shared = base_from is not None and link_files(base_from / "base", partial / "base")
        for name, tree in (("base", None if is_shared else base), ("drafter", drafter), ("lora", lora)):
            if tree:
                save_tree(partial / name, read_stored(tree))
        write_manifest(partial, manifest)


def read_checkpoint(path: str | Path, *, lazy: bool = False) -> Checkpoint:
    """Read a checkpoint directory, the base weights only as somebody asks for them where it is to be `lazy`.

    A missing or damaged file, an unknown key or a wrong shape raises `UserError` naming the first.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: not a directory (make one with: dvi import)")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no checkpoint: {MANIFEST} is missing (see: dvi import --help)")
    config = LlamaConfig.from_json(read_json(path / "config.json"), str(path / "config.json"))
    manifest = read_manifest(path)
    shapes = base_shapes(config)
    if manifest.quantisation is not None and manifest.quantisation.head:
        shapes["head"] = shapes["embed"]
    return Checkpoint(
        path,
        config,
        manifest,
        load_tree(path / "base", shapes, lazy=lazy),
        load_tree(path / "drafter") if (path / "drafter").exists() else None,
        load_tree(path / "lora") if (path / "lora").exists() else None,
        _read_optional(path / "tokenizer.json"),
        _read_optional(path / "chat_template.jinja"),
        _read_special_tokens(path / SPECIAL_TOKENS),
        read_draft_vocabulary(path),
    )


def rewrite_checkpoint(
    checkpoint: Checkpoint, path: str | Path, *, share_base: bool = False, **changes: Unpack[Changes]
) -> None:
    """Write `checkpoint` at `path` with fields replaced: `manifest=`, `drafter=`, `lora=`.

    `share_base`: by links to the files of `checkpoint.path` where that can be, instead of a copy.
    """
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
        special_tokens=new.special_tokens,
        draft_vocabulary=new.draft_vocabulary,
        base_from=checkpoint.path if share_base else None,
    )


def read_draft_vocabulary(directory: Path) -> tuple[int, ...] | None:
    """The only tokens that the drafter of a directory drafts, None for all."""
    path = directory / DRAFT_VOCABULARY
    return read_token_ids(path) if path.exists() else None


def read_token_ids(path: Path) -> tuple[int, ...]:
    """A JSON list of token ids; anything else is a `UserError`."""
    ids = read_json(path)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(f"{path} must be a JSON list of token ids")
    return tuple(ids)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory, once every file it has a checksum of was found as it was written.

    Raises `UserError` naming what is wrong; a directory written before there were checksums is believed.
    """
    where = str(directory / MANIFEST)
    document = read_json(directory / MANIFEST)
    checksums = document.pop("checksums", {}) if isinstance(document, dict) else {}
    if not isinstance(checksums, dict):
        raise UserError(f"{where}: checksums must be an object of file names, got {type(checksums).__name__}")
    manifest = from_dict(Manifest, document, where)
    own = checksums.pop(MANIFEST, None)
    if own is not None and own != _manifest_checksum(document, checksums):
        raise UserError(f"{where} is damaged: it differs from its checksum")
    verify_files(directory, checksums)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The last file of a directory: all others are hashed here."""
    document, checksums = asdict(manifest), hash_files(directory)
    checksums[MANIFEST] = _manifest_checksum(document, checksums)
    text = json.dumps(document | {"checksums": checksums}, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _manifest_checksum(document: dict[str, Any], checksums: dict[str, Any]) -> str:
    """SHA-256 of the manifest's values and the other files' checksums, however they are laid out as text."""
    return hashlib.sha256(json.dumps([document, checksums], sort_keys=True).encode()).hexdigest()


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """Save a nested dict of arrays as one orbax checkpoint; integer keys become strings.

    A disk without room for them is an `OSError` before anything is written.
    """
    require_space(path.parent, sum(leaf.nbytes for _, leaf in _flatten(tree)))
    # Synchronous, uncompressed and without orbax's copy of host arrays: the write then takes no memory of its own.
    handlers = ocp.type_handlers
    copies = "deepcopy_host_arrays" in inspect.signature(handlers.NumpyHandler).parameters  # orbax 0.12.4 never copies
    numpy_handler = handlers.NumpyHandler(**({"deepcopy_host_arrays": False} if copies else {}))
    registry = handlers.create_type_handler_registry((np.ndarray, numpy_handler), (jax.Array, handlers.ArrayHandler()))
    alone = {"multiprocessing_options": one_process()}
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry, **alone)
    try:
        with ocp.Checkpointer(handler, **alone) as checkpointer:
            checkpointer.save(path.absolute(), ocp.args.PyTreeSave(string_keys(tree)))
        _forget_place(path)
    except ValueError as error:  # what tensorstore makes of errors of the file system, e.g. a quota
        raise UserError(f"cannot write {path}: {error}") from error


def _forget_place(path: Path) -> None:
    """Take the folder's path out of orbax's mark that all was written; that the file is there counts, not its text."""
    mark = path / "commit_success.txt"
    if mark.exists():  # releases differ
        mark.write_text("Checkpoint commit was successful", encoding="utf-8")


def load_tree(path: Path, shapes: dict[str, Any] | None = None, *, lazy: bool = False) -> dict[str, Any]:
    """Read what `save_tree` wrote, as numpy, whatever devices it was written from; `lazy`: as `StoredArray`s.

    The shapes that it says it has are compared with `shapes`, if given, and with the bytes on the disk before any array
    is read. Anything else than such a directory is a `UserError`.
    """
    if not path.is_dir():
        raise UserError(f"{path} is missing from the checkpoint")
    size = _size_of(path)
    try:
        with reader() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata
            if metadata is None:
                raise ValueError("what it says of its arrays is damaged")
            structure = metadata.tree
            if shapes is not None:
                check_shapes(with_wholes(structure, shapes, str(path)), shapes, str(path))
            _check_size(structure, size, path)
            if lazy:
                return stored_tree(path, structure)
            as_numpy = _map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            return checkpointer.restore(path.absolute(), restore_args=as_numpy)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {str(error)[:MOST_MESSAGE]}") from error


def _size_of(path: Path) -> int:
    """Bytes of the files under `path`; `UserError` for what is neither file nor directory: opening it might block."""
    total = 0
    for each in path.rglob("*"):
        if not each.is_dir():
            if each.exists() and not each.is_file():
                raise UserError(f"{each} is not a file")
            total += each.stat().st_size if each.exists() else 0
    return total


def _check_size(structure: dict[str, Any], size: int, path: Path) -> None:
    """Raise `UserError` if the arrays would need far more bytes than the `size` of their files."""
    needed = 0
    for _, leaf in _flatten(structure):
        pieces = leaf.storage.chunk_shape if leaf.storage else None  # each is read as a whole, however large
        needed += max(prod(leaf.shape), prod(pieces or ())) * np.dtype(leaf.dtype).itemsize
    if needed > MOST_INFLATED * size + SMALL:
        raise UserError(f"{path} says it holds arrays of {needed} bytes, in {size} bytes on the disk")


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


def check_finite(tree: dict[str, Any], where: str) -> None:
    """Raise `UserError` naming the first array of `tree` with a number that is not finite."""
    for name, array in _flatten(tree):
        if array is not None and not np.isfinite(np.asarray(array)).all():
            raise UserError(f"{where}: {name} has numbers that are not finite")


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


def _read_special_tokens(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    tokens = read_json(path)
    if not isinstance(tokens, dict) or not all(isinstance(text, str) for text in tokens.values()):
        raise UserError(f"{path} must be an object of names and texts")
    return tokens


def _read_optional(path: Path) -> str | None:
    return read_text(path) if path.exists() else None
