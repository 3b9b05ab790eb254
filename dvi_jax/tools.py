"""Where the packages around the library are: `conversion`, `experiments` and `kangaroo_ref`; and for child processes.

In a clone they lie beside this package. An installed wheel keeps them inside it, in `_tools/`, since such names might
be others' as well; they are importable only in a process that asked for them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
INSTALLED, CLONE = PACKAGE / "_tools", PACKAGE.parent


def tools_folder() -> Path:
    """The folder that holds them."""
    return INSTALLED if INSTALLED.is_dir() else CLONE


def make_tools_importable() -> None:
    """From here on this process imports them by their own names."""
    folder = str(tools_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def environment_of_child() -> dict[str, str]:
    """The environment for a Python process, started with -P, that finds the packages of this one, and no others."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def shipped(kind: str, name: str) -> Path | None:
    """A config (`configs`, without or with .yaml) or a kept drafter (`results/drafters`) that comes with the package.

    None where there is none of that name.
    """
    names = _shipped(kind)
    return names.get(name) or names.get(f"{name}.yaml")


def shipped_names(kind: str) -> list[str]:
    """The names that `shipped` knows, without .yaml."""
    return sorted(name.removesuffix(".yaml") for name in _shipped(kind))


def _shipped(kind: str) -> dict[str, Path]:
    folder = tools_folder() / "experiments" / kind
    return {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
