"""Directories that are there whole or not at all, and the checksums that tell when one was damaged later."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dvi_jax.errors import UserError

MANY_BYTES = 64 * 2**20
PARTIAL = ".partial"  # how the name of a directory ends that is being written, or was when its writer died


class DamageError(UserError):
    """A file is missing or is not what was written."""


@contextmanager
def partial_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path`, renamed to it when the block ends well, removed otherwise (`OSError` passes)."""
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, path)
        _flush_directory(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(path: str | Path) -> None:
    """Raise `UserError` where `path` exists and is more than an empty directory: asked before work that takes long."""
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another path or remove it first")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """`partial_directory`, where there is none yet; what the disk says is a `UserError`."""
    require_new(path)
    path = Path(path).absolute()
    try:
        with partial_directory(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in place of an earlier one (`OSError` passes)."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush_directory(path.parent)


def remove_partial(directory: Path, name: str = "") -> None:
    """Remove what writers that were killed left in `directory`; nobody may be writing there.

    With `name`, only what was to be `name` or `name-...`: others may be writing other things beside it.
    """
    for path in directory.glob(f".*{PARTIAL}"):
        if not name or path.name.startswith((f".{name}.", f".{name}-")):
            shutil.rmtree(path, ignore_errors=True)


def link_files(source: Path, target: Path) -> bool:
    """Make `target` the directory `source` by links to its files; False, and no `target`, where links cannot be.

    For files that are never written again: both names are the same bytes, counted once by the disk.
    """
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system, or one without links
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def cache_folder() -> Path:
    """Where downloads, imports and compiled programs are kept: $DVI_JAX_CACHE, or else ~/.cache/dvi_jax.

    A user without a home directory must name one: `UserError`.
    """
    given = os.environ.get("DVI_JAX_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "dvi_jax"
    except RuntimeError as error:
        raise UserError("there is no home directory to keep files in: set DVI_JAX_CACHE to a folder") from error


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal of every file under `directory`, by its relative path."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    hashes: dict[str, str] = {}
    for name, found in zip(names, _hash_all([directory / name for name in names]), strict=True):
        if found is None:
            raise OSError(errno.EIO, f"{name} cannot be read back")
        hashes[name] = found
    return hashes


def verify_files(directory: Path, checksums: Mapping[str, object]) -> None:
    """Raise `DamageError` naming the first file of `checksums` that is missing from `directory` or differs.

    Names that lead outside the directory are refused, and only regular files are opened.
    """
    names = sorted(checksums)
    for name in names:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise DamageError(f"{directory}: the checksums name {name!r}, which is not a file inside it")
        if not _is_file(directory / name):
            raise DamageError(f"{directory / name} is missing or cannot be read")
    for name, found in zip(names, _hash_all([directory / name for name in names]), strict=True):
        if found is None:
            raise DamageError(f"{directory / name} is missing or cannot be read")
        if found != checksums[name]:
            raise DamageError(f"{directory / name} is damaged: it differs from its checksum")


def _hash_all(paths: Sequence[Path]) -> list[str | None]:
    """SHA-256 of each file, None for what is no file that can be read; large ones side by side."""
    if sum(map(_size, paths)) < MANY_BYTES:  # threads would cost more than they save
        return [_hash_file(path) for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter
        return list(pool.map(_hash_file, paths))


def _hash_file(path: Path) -> str | None:
    if not _is_file(path):
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def require_space(directory: Path, nbytes: int) -> None:
    """Raise `OSError` (ENOSPC) where so many bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        reason = f"no space left: {nbytes / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, reason)


def _flush_directory(path: Path) -> None:
    """Bring a rename to the disk, where directories can be: some file systems refuse, and the rename is done."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # it may be written and not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)
