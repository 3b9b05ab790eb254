"""Reading settings strictly: what is unknown, ill-typed, not finite or absurdly long is an error that names the key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import dacite
import yaml

from dvi_jax.errors import UserError

T = TypeVar("T")


def _several(value: object) -> object:
    """A value where several are wanted: `data.files=ONE` is a list of one."""
    return [value] if isinstance(value, str | int) else value


_ONE_IS_SEVERAL: dict[Any, Any] = {tuple[str, ...]: _several, tuple[int, ...]: _several}

MOST_YAML = 64 * 1024  # characters; real files have two thousand, and parsing is slow
MOST_DEPTH = 20
MOST_BITS = 4096
INT32 = 2**31 - 1  # counts and lengths lie in int32 arrays on the device,
UINT32 = 2**32 - 1  # seeds in uint32 ones,
FLOAT32 = 3.4e38  # and numbers in float32 ones
MOST_MESSAGE = 300  # characters of a complaint, which may repeat the value it is about
# What parsers make of text that is no settings: besides their own errors, Python's about dates, numbers and depth.
MALFORMED = (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` saying what `name` must be unless `condition`."""
    if not condition:
        raise UserError(f"{name} must be {allowed}, got {_shown(value)}")


def require_count(name: str, value: int, least: int = 1, most: int = INT32) -> None:
    """`require` for a whole number that ends up in an array or a shape."""
    require(value >= least, name, value, f"at least {least}" if least else "0 or above")
    require(value <= most, name, value, f"at most {most}")


def require_path(name: str, value: str) -> None:
    """`require` for what is to name a file or a directory."""
    require(bool(value) and "\0" not in value, name, value, "a path, without NUL characters")


def from_dict(cls: type[T], data: object, where: str, places: Mapping[str, str] | None = None) -> T:
    """Build the dataclass `cls` from plain JSON/YAML values; `where` names the source in messages.

    `places` names another source of single settings, by their path.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must hold a mapping of settings, got {type(data).__name__}")
    _refuse_unknown(cls, data, where, places or {})
    try:
        built = dacite.from_dict(cls, data, dacite.Config(strict=True, cast=[tuple, float], type_hooks=_ONE_IS_SEVERAL))
    except dacite.DaciteFieldError as error:
        source = _source(error.field_path or "", where, places or {})
        raise UserError(f"{source}: {str(error)[:MOST_MESSAGE]}") from error
    except (dacite.DaciteError, *MALFORMED) as error:
        raise UserError(f"{where}: {str(error)[:MOST_MESSAGE]}") from error
    for name, kind, value in _values(built):
        if isinstance(value, bool) and "bool" not in kind and "dict" not in kind:
            raise UserError(f"{where}: {name} must be of type {kind}, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} must be a finite number, got {value}")
        if isinstance(value, (int, float)) and abs(value) > FLOAT32:
            raise UserError(f"{where}: {name} must be a number of 32 bits, got {_shown(value)}")
    return built


def _source(path: str, where: str, places: Mapping[str, str]) -> str:
    """Where the setting `path`, or a part of it, comes from."""
    return next((place for key, place in places.items() if f"{key}.".startswith(f"{path}.")), where)


def _refuse_unknown(cls: type, data: dict[Any, Any], where: str, places: Mapping[str, str], prefix: str = "") -> None:
    """Raise `UserError` for the first key that is no setting, by its path and with the nearest that is one."""
    hints, names = get_type_hints(cls), {each.name for each in fields(cls)}
    for key, value in data.items():
        path = f"{prefix}{key}"
        if key not in names:
            near = get_close_matches(path[:MOST_MESSAGE], [prefix + name for name in sorted(names)], 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"{_source(path, where, places)}: unknown key {path[:MOST_MESSAGE]}{hint}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            _refuse_unknown(hints[key], value, where, places, f"{path}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_YAML + 1)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"cannot read config {path!r}: {error}") from error
    data = parse_yaml(text, str(path)) or {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Plain values; `UserError` for what is not YAML, has object tags or aliases, or is too long or too deep."""
    if len(text) > MOST_YAML:
        raise UserError(f"{where}: longer than the {MOST_YAML} characters that settings may have")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, *MALFORMED) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error or type(error).__name__)
        raise UserError(f"{where[:MOST_MESSAGE]}: not valid YAML{line}: {problem[:MOST_MESSAGE]}") from error


class _Loader(yaml.SafeLoader):
    """Without aliases, which no settings need and which make a short text a huge value, and without deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        if self.depth == MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MOST_DEPTH} deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > MOST_BITS:  # 0xff...: Python itself refuses to write more than 4300 digits
            raise yaml.constructor.ConstructorError(None, None, "an absurdly large number", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _shown(value: object) -> str:
    try:
        return repr(value)[:MOST_MESSAGE]
    except ValueError:  # an integer of more digits than Python writes
        return "a huge number"


def _values(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(name, declared type, value) of every value, inside sections, tuples and dicts too."""
    for each in fields(settings):
        yield from _inside(prefix + each.name, str(each.type), getattr(settings, each.name))


def _inside(name: str, kind: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    if is_dataclass(value):
        yield from _values(value, f"{name}.")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _inside(f"{name}.{key}", kind, part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _inside(name, kind, part)
    else:
        yield name, kind, value
