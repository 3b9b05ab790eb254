"""What a container leaves a process of its machine: the memory limits of control groups (cgroups), version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Of each version: the file system, its files for the limit, for what is used, and what of it can be taken back.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def container_bytes(system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process still allow; None where none of them has a limit.

    Every group above the process's own limits it, too; inside a container its own may be the root that it sees.
    """
    rooms = [room for folder, names in _groups(system, process) if (room := _room(folder, names)) is not None]
    return min(rooms, default=None)


def _groups(system: Path, process: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The directories of the groups that this process is in, innermost first, with the names of their files."""
    for line in _read(process).splitlines():
        number, controllers, group = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            root, names = system, _V2
        elif "memory" in controllers.split(","):
            root, names = system / "memory", _V1
        else:
            continue
        folder = root / group.strip("/")
        yield from ((each, names) for each in (folder, *folder.parents) if each == root or root in each.parents)


def _room(folder: Path, names: tuple[str, str, str]) -> int | None:
    limit, used = (_read(folder / name).strip() for name in names[:2])
    if not limit.isdecimal() or not used.isdecimal():  # "max", or no such file
        return None
    stat = dict(line.rsplit(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return max(0, int(limit) - int(used) + int(stat.get(names[2], 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
