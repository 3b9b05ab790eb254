"""The settings of a training run as a list: name, default and meaning, read off `config.py` itself."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

_FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)  # a field and the comment that says what it is


class Setting(NamedTuple):
    """One setting as people see it."""

    name: str  # its path, as in `--set`
    default: str
    meaning: str


def list_settings(cls: type, prefix: str = "") -> list[Setting]:
    """Every setting of a dataclass, those of its sections included, in the order of their declaration."""
    meanings = dict(_FIELD.findall(inspect.getsource(cls)))
    hints, found = get_type_hints(cls), []
    for each in fields(cls):
        if is_dataclass(hints[each.name]):
            found += list_settings(hints[each.name], f"{prefix}{each.name}.")
        else:
            found.append(Setting(prefix + each.name, _default(each), meanings[each.name]))
    return found


def _default(each: Field[Any]) -> str:
    if each.default is not MISSING:
        return "none" if each.default is None else "()" if each.default == () else str(each.default)
    return "required" if each.default_factory is MISSING else str(each.default_factory())
