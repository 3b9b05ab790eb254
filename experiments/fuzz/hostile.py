"""`python -m experiments.fuzz.hostile`: checkpoints and packed files made to take all memory, to block or to crash.

Each is read in a process of its own, forked from one that has imported everything. It passes if it is refused in one
line or read, within 2 seconds of work and a GiB of memory. Exit status 1 if one does not.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from dvi_jax.checkpoint import MANIFEST, read_checkpoint
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.learn.packing import load_packed
from dvi_jax.model.llama import base_shapes
from dvi_jax.presets import TINY

FORK = multiprocessing.get_context("fork")
MOST_SECONDS, MOST_BYTES, PATIENCE_SECONDS = 2.0, 2**30, 30
DEEP = "[" * 200_000
HUGE = (2**20, 2**26)  # 256 TiB of float32
LARGE = (2**14, 2**15)  # 2 GiB of it


@dataclass(frozen=True)
class Case:
    """`make` writes it into an empty folder, `read` is what a user would have done with it."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """What came of a case: `told` is the one line, "read", or what should not have happened."""

    told: str
    seconds: float  # of the processor
    peak: int  # bytes beyond what the process began with

    @property
    def passed(self) -> bool:
        """Whether it is within the bounds."""
        return not self.told.startswith("!") and self.seconds < MOST_SECONDS and self.peak < MOST_BYTES


def main() -> int:
    """Read all, print the table."""
    ArgumentParser(prog="python -m experiments.fuzz.hostile", description=__doc__).parse_args()
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    table, failed = Table("case", "s", "MiB", "told"), 0
    for case in cases():
        outcome = judged(case)
        failed += not outcome.passed
        mark = "" if outcome.passed else "FAILED "
        told = (mark + outcome.told)[:100]
        table.add_row(case.name, f"{outcome.seconds:.2f}", f"{outcome.peak / 2**20:.0f}", told)
    Console(width=200).print(table)
    print(f"{table.row_count} cases, {failed} failed")
    return int(failed > 0)


def judged(case: Case) -> Outcome:
    """Make a case and read it, each in a fork of this process: what stores arrays can be used on one side alone."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        maker = FORK.Process(target=case.make, args=(folder,))
        maker.start()
        maker.join()
        assert maker.exitcode == 0
        reader = FORK.Process(target=_read_and_tell, args=(case, folder, folder / "outcome.json"))
        reader.start()
        reader.join()
        if reader.exitcode:
            return Outcome(f"! ended by {signal.Signals(-reader.exitcode).name}", 0.0, 0)
        return Outcome(**json.loads((folder / "outcome.json").read_text(encoding="utf-8")))


def _read_and_tell(case: Case, folder: Path, answer: Path) -> None:
    """A child's whole life; one that blocks is ended by an alarm."""
    signal.alarm(PATIENCE_SECONDS)
    limit = _bytes("VmSize") + 4 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, began = _bytes("VmHWM"), time.process_time()
    try:
        case.read(folder)
        told = "read"
    except UserError as error:
        told = str(error) if "\n" not in str(error) else f"! several lines: {error}"
    except BaseException as error:  # all others are findings
        told = f"! {type(error).__name__}: {error}"
    outcome = {"told": told[:1000], "seconds": time.process_time() - began, "peak": _bytes("VmHWM") - before}
    answer.write_text(json.dumps(outcome), encoding="utf-8")


def _bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def cases() -> Iterator[Case]:
    """All of them, the packed files first."""
    for name, write in _packed_files().items():
        yield Case(f"packed: {name}", partial(_pack, write), _read_packed)
    for name, change in _checkpoint_changes().items():
        yield Case(f"checkpoint: {name}", partial(_spoil, change), _read_checkpoint)


def _read_packed(folder: Path) -> object:
    return load_packed([folder / "x.npz"]).hold_out(1)


def _read_checkpoint(folder: Path) -> object:
    return read_checkpoint(folder / "c")


# Packed files.


def _pack(write: Callable[[Path], None], folder: Path) -> None:
    write(folder / "x.npz")


def _packed_files() -> dict[str, Callable[[Path], None]]:
    """How to write each, by name."""
    bits = {"mask": (np.uint8, (2**20, 2**23))}

    def bomb(dtype: type, ratio: int) -> Callable[[Path], None]:
        tokens = {"tokens": (dtype, (2**10, 2**17)), "mask": (np.uint8, (2**10, 2**14))}
        return lambda path: _write_npz(path, tokens, content=ratio)

    shapes: dict[str, Any] = {
        "256 TiB": {"tokens": (np.int32, HUGE)} | bits,
        "2 GiB": {"tokens": (np.int32, LARGE), "mask": (np.uint8, (2**14, 2**12))},
        "beyond 64 bits": {"tokens": (np.int32, (2**40, 2**40)), "mask": (np.uint8, (2**40, 2**37))},
        "negative": {"tokens": (np.int32, (-4, -4)), "mask": (np.uint8, (-4, 1))},
        "empty": {"tokens": (np.int32, (0, 2**40)), "mask": (np.uint8, (0, 2**37))},
        "no dimensions": {"tokens": (np.int32, ()), "mask": (np.uint8, ())},
        "many dimensions": {"tokens": (np.int32, (1,) * 60), "mask": (np.uint8, (1,))},
        "a huge mask": {"tokens": (np.int32, (4, 8)), "mask": (np.uint8, HUGE)},
        "records": {"tokens": ("V1000000000", (4, 8)), "mask": (np.uint8, (4, 1))},
        "texts": {"tokens": ("U200000000", (4, 8)), "mask": (np.uint8, (4, 1))},
        "objects": {"tokens": (object, (4, 8)), "mask": (np.uint8, (4, 1))},
        "fractions": {"tokens": (np.float64, (2**14, 2**15)), "mask": (np.uint8, (2**14, 2**12))},
    }
    files: dict[str, Callable[[Path], None]] = {
        name: partial(_write_npz, arrays=arrays) for name, arrays in shapes.items()
    }
    return files | {
        "128 MiB of zeros": bomb(np.uint8, 1),
        "1 GiB of zeros": bomb(np.int64, 1),
        "a long header": lambda path: _write_entries(path, {"tokens.npy": _long_header(), "mask.npy": b""}),
        "no arrays": lambda path: _write_entries(path, {"tokens.npy": b"\0" * 2**26, "mask.npy": b""}),
        "many entries": lambda path: _write_entries(path, {f"{index}.npy": b"" for index in range(20_000)}),
        "a pipe": os.mkfifo,
        "a directory": Path.mkdir,
        "no archive": lambda path: path.write_bytes(b"PK\5\6" + b"\xff" * 100),
    }


def _write_npz(path: Path, arrays: dict[str, Any], content: int = 0) -> None:
    """Headers, and no array behind them, or zeros, packed a thousand times smaller."""
    entries = {}
    for name, (dtype, shape) in arrays.items():
        header = io.BytesIO()
        kind = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_2_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        entries[f"{name}.npy"] = header.getvalue()
        if content:
            entries[f"{name}.npy"] += bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    _write_entries(path, entries)


def _write_entries(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _long_header() -> bytes:
    text = b"{'descr': '<i4', 'fortran_order': False, 'shape': (" + b"1," * 20_000_000 + b")}"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text


# Checkpoints.


def _spoil(change: Callable[[Path], None], folder: Path) -> None:
    """A small checkpoint without checksums, changed."""
    path = folder / "c"
    path.mkdir()
    manifest = {"source": "", "source_sha256": "", "dtype": "float32", "exit_layer": 1}
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(TINY.to_json()), encoding="utf-8")
    _save(path / "base", _zeros(base_shapes(TINY)))
    _save(path / "drafter", {"w": np.zeros((4, 4), np.float32)})
    change(path)


def _zeros(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: _zeros(part) for name, part in shapes.items()}
    return np.zeros(shapes, np.float32)


def _save(path: Path, tree: dict[str, Any]) -> None:
    """A directory for each array, whose description is a JSON file that anybody can edit."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.PyTreeSave(tree))


def _checkpoint_changes() -> dict[str, Callable[[Path], None]]:
    """What is done to a good one, by name."""

    def described(name: str, **values: Any) -> Callable[[Path], None]:
        return lambda path: _edit(path / name / ".zarray", values)

    def replaced(name: str, content: str) -> Callable[[Path], None]:
        return lambda path: _replace(path / name, content)

    def piped(name: str) -> Callable[[Path], None]:
        return lambda path: _pipe(path / name)

    def architecture(**values: int) -> Callable[[Path], None]:
        return lambda path: _edit(path / "config.json", values)

    def manifest(**values: Any) -> Callable[[Path], None]:
        return lambda path: _edit(path / MANIFEST, values)

    files = ("config.json", MANIFEST, "tokenizer.json", "chat_template.jinja", "draft_vocabulary.json")
    inner = ("base/_METADATA", "base/embed/.zarray", "base/embed/0.0", "drafter/_METADATA", "drafter/w/0.0")
    return {
        "a base of 256 TiB": described("base/embed", shape=HUGE),
        "a drafter of 256 TiB": described("drafter/w", shape=HUGE),
        "a drafter of 2 GiB": described("drafter/w", shape=LARGE),
        "a drafter in pieces of 2 GiB": described("drafter/w", chunks=LARGE),
        "a base in pieces of 256 TiB": described("base/embed", chunks=HUGE),
        "no dimensions": described("base/embed", shape=[], chunks=[]),
        "texts for numbers": described("drafter/w", dtype="<U100000000"),
        "an architecture of 16 TiB": architecture(vocab_size=2**24, hidden_size=2**20),
        "a thousand layers": architecture(num_layers=1024),
        "ranks beyond bounds": manifest(lora={"rank_s": 10**9}),
        "another drafter": manifest(drafter="x" * 10**6),
        "a hundred thousand checksums": manifest(checksums={str(index): "0" * 64 for index in range(10**5)}),
        "a folder in a folder": lambda path: os.makedirs(path / "drafter" / "/".join(["d"] * 500)),
        "a link to itself": lambda path: (path / "drafter" / "x").symlink_to("x"),
        "a device": lambda path: _link(path / "config.json", "/dev/zero"),
        **{f"deep: {name}": replaced(name, DEEP) for name in (*files[:2], *files[4:], *inner[:2], inner[3])},
        **{f"a pipe: {name}": piped(name) for name in (*files, *inner)},
    }


def _edit(path: Path, values: dict[str, Any]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | values), encoding="utf-8")


def _replace(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


if __name__ == "__main__":
    sys.exit(run_cli(main))
