"""A model by any name people have for it: a checkpoint, a Hugging Face directory, a GGUF file, a cached repository.

What is no checkpoint is imported once into the cache folder. There it lies under a name made of where its files are,
what they were when they were read, and the dtype, so that a source that changes is imported again. A lock lets one
process import while others wait; one that is killed leaves nothing that another would take for whole.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from dvi_jax.checkpoint import MANIFEST, Checkpoint, read_checkpoint
from dvi_jax.directories import cache_folder, remove_partial
from dvi_jax.errors import UserError
from dvi_jax.importing.checkpoint import write_import
from dvi_jax.importing.files import read_json_object
from dvi_jax.importing.gguf_file import PART_NAME
from dvi_jax.importing.source import open_source
from dvi_jax.quantisation import Quantisation, chosen_storage
from dvi_jax.settings import require_path

_VERSION = 2  # of what an import makes of a source; a change of it imports everything again
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_HASHED_WHOLE = 1 << 20  # bytes up to which a file is told by its content


def open_checkpoint(
    source: str | Path, dtype: str | None = None, weights: str | None = None, *, lazy: bool = False
) -> Checkpoint:
    """The checkpoint that `source` is or becomes; `lazy` as for `read_checkpoint`.

    `source`: a checkpoint directory, a Hugging Face directory, a GGUF file, or the name of a repository in the local
    Hugging Face cache (`org/name`). `dtype` ("float32", "bfloat16") is that of an import; the default is bfloat16 on
    accelerators, float32 on CPUs. `weights`: what matrices are kept in ("int8", "int4" or "float8"; "bfloat16" is that
    dtype). Raises `UserError` for anything else, and for a checkpoint of other weights.
    """
    checkpoint = read_checkpoint(checkpoint_directory(source, dtype, weights), lazy=lazy)
    dtype, quantisation = chosen_storage(weights, dtype)
    if dtype not in (None, checkpoint.manifest.dtype):
        raise UserError(f"{source} holds {checkpoint.manifest.dtype} weights; give its source to get {dtype}")
    kept = checkpoint.manifest.quantisation
    if weights is not None and (kept and kept.weights) != (quantisation and quantisation.weights):
        found = checkpoint.manifest.dtype if kept is None else kept.weights
        raise UserError(f"{source} holds matrices in {found}; give its source to get {weights}")
    return checkpoint


def checkpoint_directory(source: str | Path, dtype: str | None = None, weights: str | None = None) -> Path:
    """The directory of `open_checkpoint`, importing what has to be imported."""
    dtype, quantisation = chosen_storage(weights, dtype)
    require_path("a model's name", str(source))
    path = named_source(source)
    if not _exists(path):
        raise UserError(
            f"no checkpoint at {source}: no such file or directory, nor a repository in the Hugging Face cache"
        )
    if path.is_dir() and not (path / MANIFEST).exists() and not (path / "config.json").exists():
        path = _only_gguf(path) or path
    return _import_once(path, dtype or _default_dtype(), quantisation) if _is_source(path) else path


def named_source(name: str | Path) -> Path:
    """What a model's name stands for: the path itself, unless only the local Hugging Face cache has such a name."""
    path = Path(name)
    return path if _exists(path) else _in_hub_cache(str(name)) or path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _is_source(path: Path) -> bool:
    if path.is_file():
        return True
    config = path / "config.json"
    return not (path / MANIFEST).exists() and config.is_file() and "num_hidden_layers" in read_json_object(config)


def _import_once(source: Path, dtype: str, quantisation: Quantisation | None) -> Path:
    root = cache_folder() / "models"
    form = dtype if quantisation is None else f"{dtype}-{quantisation.weights}"
    key = _identity(source, form)
    out = root / f"{_name(source)[:64]}-{form}-{key}"
    if (out / MANIFEST).exists():
        return out
    with _locked(root, key):
        if not (out / MANIFEST).exists():
            remove_partial(root, out.name)
            model = open_source(source)
            print(f"importing {source} as {form} into {out}, once", file=sys.stderr)
            write_import(source, out, model, dtype=dtype, quantisation=quantisation)
    return out


def _name(source: Path) -> str:
    """What people call it; a snapshot in Hugging Face's cache has only its revision for a name."""
    path = source.absolute()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--")
    return (path.stem if path.is_file() else path.name) or "model"


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """Alone with this key among all processes; the system takes the lock from one that dies."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{key}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot import into {root}: {error.strerror}; set DVI_JAX_CACHE to a folder") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _identity(source: Path, form: str) -> str:
    """A name for the files of a source as they are now: small ones by content, large ones by place, size and times."""
    digest = hashlib.sha256(f"{_VERSION} {form} {source.resolve()}\n".encode())
    for path in _files(source):
        try:
            facts = path.stat()
            told = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {path.resolve()}"
            if facts.st_size <= _HASHED_WHOLE:
                told = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        digest.update(f"{path.name} {told}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(source: Path) -> list[Path]:
    """What an import may read of a source: a file and the other parts of a split one, or a directory's files."""
    if source.is_file():
        match = PART_NAME.fullmatch(source.name)
        pattern = f"{glob.escape(match['stem'])}-*-of-{match['count']}.gguf" if match else glob.escape(source.name)
        return sorted(source.parent.glob(pattern))
    folders = (source, *(source / name for name in ("additional_chat_templates", "drafter", "lora")))
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file())


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that has nothing else to import; several are a `UserError`."""
    matches = {path: PART_NAME.fullmatch(path.name) for path in sorted(directory.glob("*.gguf"))}
    found = [path for path, match in matches.items() if match is None or int(match["number"]) == 1]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory} holds several GGUF files: name one of {names:.400}")
    return found[0] if found else None


def _in_hub_cache(name: str) -> Path | None:
    """The snapshot of a repository in the local Hugging Face cache that its main branch, or else the newest, is."""
    cache = _hub_cache()
    if cache is None or not _HUB_NAME.fullmatch(name):
        return None
    repository = cache / f"models--{name.replace('/', '--')}"
    main, snapshots = repository / "refs" / "main", repository / "snapshots"
    if main.is_file():
        revision = main.read_text(encoding="utf-8", errors="replace").strip()
        if revision.isalnum() and (snapshots / revision).is_dir():
            return snapshots / revision
    found = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else None


def _hub_cache() -> Path | None:
    """Where Hugging Face keeps repositories; None for a user without a home who names no other place."""
    try:
        for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
            if os.environ.get(name):
                return Path(os.environ[name]).expanduser() / below
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"
    except RuntimeError:
        return None
