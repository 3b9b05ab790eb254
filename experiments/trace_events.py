"""Reads a `jax.profiler` trace: what ran on the device and when, what the driver was asked, and which part of a
compiled program an event belongs to.

On a GPU the device's streams are read, on the CPU the threads that run the program's instructions. A fact that a trace
does not hold (it depends on the jax version and the device) is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from dvi_jax.errors import UserError

_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|(^|_)dot($|_)|matmul|splitk", re.IGNORECASE)
_COPY = re.compile(r"^mem(cpy|set)", re.IGNORECASE)
_COPY_NUMBER = re.compile(r"__\d+$")  # XLA numbers the kernels of one name that it compiled more than once
_DRIVER_CALL = re.compile(r"^(cu|cuda)[A-Z]\w+$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_CONTROL = ("while", "conditional", "call")  # their time is that of the instructions inside
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_DERIVED_LINES = ("XLA ", "Steps", "Framework", "TensorFlow", "Source", "Async")
# The named scopes of the model, the innermost first: a draft head lies inside the drafter, attention inside a trunk.
_PARTS = ("draft_head", "drafter", "deep", "shallow", "head")


@dataclass(frozen=True)
class Instruction:
    """What the compiled program says of one instruction."""

    opcode: str
    op_name: str  # the path of named scopes and the primitive, "" if unknown
    weight: tuple[int, ...]  # shape of the largest operand

    @property
    def part(self) -> str:
        """The part of the model, by its named scope."""
        if not self.op_name:
            return "without a place"
        path = self.op_name.split("/")
        part = next((name for name in _PARTS if name in path), "round")
        inner = next((name for name in ("attention", "mlp") if name in path), "")
        return f"{part} {inner}".strip()


@dataclass(frozen=True)
class Event:
    """One kernel or copy on the device."""

    name: str
    start_ns: float
    duration_ns: float
    stats: dict[str, Any]

    @property
    def is_copy(self) -> bool:
        """Copied or filled memory by itself, outside of any kernel."""
        return bool(_COPY.match(self.name))

    @property
    def copy_label(self) -> str:
        """The direction, and the size where the trace has it."""
        size = re.search(r"(?:size|num_bytes):(\d+)", str(self.stats.get("memcpy_details", "")))
        return f"{self.name} {size[1]} bytes" if size else self.name

    def instruction(self, program: dict[str, Instruction]) -> Instruction | None:
        """The instruction that this event runs, found by what the profiler noted or by the kernel's name."""
        return program.get(sanitized(str(self.stats.get("hlo_op", "")))) or program.get(sanitized(self.name))

    def group(self, program: dict[str, Instruction]) -> str:
        """What to count this event under."""
        if self.is_copy:
            return self.name
        found = self.instruction(program)
        is_matmul = bool(_MATMUL.search(sanitized(self.name)))
        if found is None:
            return "matrix product, library kernel" if is_matmul else f"kernel {_COPY_NUMBER.sub('', self.name)[:40]}"
        if is_matmul or found.op_name.endswith("dot_general"):
            return f"{found.part}: matrix product {'x'.join(map(str, found.weight))}"
        return f"{found.part}: the rest"


@dataclass(frozen=True)
class Trace:
    """Events of the device in order of time, and how often each call to the driver was made."""

    device: list[Event]
    driver_calls: Counter[str]
    lines: dict[str, int]  # every line of the trace with its number of events: what there was to read

    def without_control(self, program: dict[str, Instruction]) -> Trace:
        """The trace less loops and branches themselves, which the CPU lists beside what runs inside them.

        Copies stay: a GPU's are noted under the loop whose condition they take to the host.
        """
        found = ((event, event.instruction(program)) for event in self.device)
        kept = [
            event
            for event, instruction in found
            if event.is_copy or instruction is None or instruction.opcode not in _CONTROL
        ]
        return replace(self, device=kept)

    def coverage(self) -> tuple[float, float, list[float]]:
        """Nanoseconds from the first event to the last, those with at least one running, and every gap."""
        if not self.device:
            return 0.0, 0.0, []
        busy, gaps, end = 0.0, [], self.device[0].start_ns
        for event in self.device:
            begin, stop = max(event.start_ns, end), event.start_ns + event.duration_ns
            if event.start_ns > end:
                gaps.append(event.start_ns - end)
            busy += max(0.0, stop - begin)
            end = max(end, stop)
        return end - self.device[0].start_ns, busy, gaps


def newest_trace(folder: Path) -> Path:
    """The newest file that `jax.profiler` wrote below `folder`; `UserError` if there is none."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"no *.xplane.pb below {folder}: the profiler wrote no trace")
    return files[-1]


def read_trace(folder: Path) -> Trace:
    """Everything of interest in the newest trace below `folder`."""
    device: list[Event] = []
    calls: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for plane, line, event in _events(ProfileData.from_file(str(newest_trace(folder)))):
        lines[f"{plane}: {line}"] += 1
        if _DRIVER_CALL.match(event.name):
            calls[event.name] += 1
        elif _is_device(plane, line):
            found = Event(event.name, event.start_ns, event.duration_ns, dict(event.stats))
            if plane.startswith("/device") or "hlo_op" in found.stats:
                device.append(found)
    return Trace(sorted(device, key=lambda event: event.start_ns), calls, dict(lines))


def instructions(hlo: str) -> dict[str, Instruction]:
    """Every instruction of a compiled program's text, by its name as kernels carry it (`sanitized`)."""
    lines = list(parsed(hlo.splitlines()))
    shapes = {line.name: _dimensions(line.shape) for line in lines}
    found = {}
    for line in lines:
        operands = re.findall(r"%([\w.-]+)", line.rest.split("metadata=")[0].split("calls=")[0])
        weight = max((shapes.get(operand, ()) for operand in operands), key=prod, default=())
        found[sanitized(line.name)] = Instruction(line.opcode, line.op_name, weight)
    return found


class Line(NamedTuple):
    """An instruction as a compiled program's text has it."""

    name: str
    shape: str  # of what it gives
    opcode: str
    rest: str  # operands and attributes
    op_name: str  # as of `Instruction`


def parsed(lines: Iterable[str]) -> Iterator[Line]:
    """The instructions among the lines of a compiled program's text."""
    for match in filter(None, map(_INSTRUCTION.match, lines)):
        op_name = re.search(r'op_name="([^"]*)"', match[4])
        yield Line(match[1], match[2], match[3], match[4], op_name[1] if op_name else "")


def sanitized(name: str) -> str:
    """An instruction's name as XLA gives it to its kernel."""
    return re.sub(r"\W", "_", name)


def _events(data: ProfileData) -> Iterator[tuple[str, str, Any]]:
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                yield plane.name, line.name, event


def _is_device(plane: str, line: str) -> bool:
    if plane.startswith("/device:"):  # beside the streams there may be lines that repeat them by module or scope
        return not line.startswith(_DERIVED_LINES)
    return line.startswith("tf_XLA")


def _dimensions(text: str) -> tuple[int, ...]:
    """The largest array of a shape such as `bf16[1,4096]{1,0}`, or of a tuple of them."""
    shapes = [tuple(int(n) for n in found.split(",") if n) for found in _SHAPE.findall(text)]
    return max(shapes, key=prod, default=())
