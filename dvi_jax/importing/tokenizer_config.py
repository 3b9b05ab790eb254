"""What stands beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat templates.

Read as Hugging Face does: special tokens by name, tokens that were added later, what goes around a text, and which of
several chat templates is meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvi_jax.errors import UserError
from dvi_jax.importing.files import read_json_object, read_text
from dvi_jax.importing.tokenizer_build import AddedToken

MAX_TEMPLATE_BYTES = 1 << 20
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG, _FURTHER_TEMPLATES = "tokenizer_config.json", "additional_chat_templates"
_GGUF_TEMPLATE = "tokenizer.chat_template"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN_ID = re.compile("[0-9]{1,9}")
# Special tokens that a class of tokenizer has without saying so.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN2 = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_DEFAULTS = {"Llama": _LLAMA, "CodeLlama": _LLAMA, "GPT2": _GPT2, "Qwen2": _QWEN2}
# A class that is named has no others: templates see an empty text, not what config.json calls bos.
_NONE = dict.fromkeys(("bos_token", "eos_token"), "")
# The class of tokenizer that goes with a kind of model where no file names one.
_CLASS_OF_MODEL = {"llama": "Llama", "Yi": "Llama", "mistral": "Llama", "qwen2": "Qwen2"}


@dataclass(frozen=True)
class TokenizerConfig:
    """The settings beside a tokenizer; without any file all is empty.

    `special_tokens`: texts by name, as templates know them, "" for one that is null; `stated`: all that a file says
    itself, further special tokens included. `added`: tokens by the id that a file gives them, `flags_given` where it
    gives all their flags. `add_bos`, `add_eos`: what goes around a text, None where no file says. `family`: the class
    of tokenizer, the one of the kind of model if no file names any, without "Tokenizer" or "TokenizerFast" (empty for
    none). `defaults`: special tokens of that class by name, which a vocabulary may lack.
    """

    where: str
    family: str
    special_tokens: dict[str, str]
    defaults: dict[str, str]
    stated: tuple[str, ...]
    added: dict[int, AddedToken]
    flags_given: frozenset[int]
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    add_prefix_space: bool | None


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """The settings in `directory`; a malformed file is a `UserError`."""
    path = directory / _CONFIG
    names = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
    settings, mapped, added = (
        read_json_object(directory / name) if (directory / name).exists() else {} for name in names
    )
    is_named = bool(settings.get("tokenizer_class"))
    family = _family(settings, directory)
    # The map counts where tokenizer_config.json does not list tokens with their flags, as newer files do.
    given = mapped | settings if settings.get("added_tokens_decoder") else settings | mapped
    named = {name: _text(given[name], path, name) or "" for name in NAMES if name in given}
    extra = [
        _text(token, path, key)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for token in _values(given.get(key))
    ]
    stated = tuple(dict.fromkeys(text for text in [*named.values(), *extra] if text))
    # Without tokenizer_config.json tokenizer.json has the word.
    defaults = _DEFAULTS.get(family, {}) if path.exists() else {}
    defaults = {name: token for name, token in defaults.items() if name not in named}
    decoder = _decoder(settings, {*stated, *defaults.values()}, path)
    return TokenizerConfig(
        where=str(path),
        family=family,
        special_tokens={**(_NONE | defaults if is_named else {}), **named},
        defaults=defaults,
        stated=stated,
        added=_added(added, stated, directory) | decoder,
        flags_given=frozenset(decoder),
        add_bos=_flag(settings, "add_bos_token", path),
        add_eos=_flag(settings, "add_eos_token", path),
        # Without the key, or with null, a SentencePiece model is an old one.
        legacy=settings.get("legacy") is not False,
        add_prefix_space=_flag(settings, "add_prefix_space", path),
    )


def chat_template(directory: Path) -> str | None:
    """The chat template of a directory: `chat_template.jinja`, or the one in `tokenizer_config.json`.

    Of several with names it is the one named default; without it, `UserError` with the names.
    """
    path = directory / _CONFIG
    if (directory / "chat_template.jinja").exists():
        return read_text(directory / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    template = read_json_object(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template if _is_named(item)} or None
    if template is None and (further := sorted((directory / _FURTHER_TEMPLATES).glob("*.jinja"))):
        path = directory / _FURTHER_TEMPLATES
        template = {file.stem: read_text(file, MAX_TEMPLATE_BYTES) for file in further}
    if isinstance(template, dict):
        template = _default_of(template, path, "write the one to use into chat_template.jinja beside it")
    return _checked_template(template, str(path))


def gguf_chat_template(metadata: dict[str, Any], label: str) -> str | None:
    """The chat template of a GGUF file; where there are only ones with names, as `chat_template`."""
    template = metadata.get(_GGUF_TEMPLATE)
    prefix = f"{_GGUF_TEMPLATE}."
    named = {key.removeprefix(prefix): text for key, text in metadata.items() if key.startswith(prefix)}
    if template is None and named:
        template = _default_of(named, label, f"{_GGUF_TEMPLATE} must hold the one to use (or import from Hugging Face)")
    return _checked_template(template, label)


def _default_of(templates: dict[Any, Any], where: object, remedy: str) -> Any:
    if "default" not in templates:
        names = ", ".join(map(str, templates))
        raise UserError(f"{where}: its chat templates are named {names:.500}, and none of them default; {remedy}")
    return templates["default"]


def _checked_template(template: object, where: str) -> str | None:
    """`template` if it is absent or a string of sensible length, else a `UserError`."""
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES or not _is_unicode(template):
        raise UserError(f"{where}: the chat template must be a string of at most {MAX_TEMPLATE_BYTES >> 20} MiB")
    return template


def _family(settings: dict[str, Any], directory: Path) -> str:
    """The class of tokenizer, "" where no file names one and the kind of model says nothing either."""
    name, config = settings.get("tokenizer_class"), directory / "config.json"
    if not name and config.exists():
        model = read_json_object(config)
        kind = model.get("model_type")
        name = model.get("tokenizer_class") or (_CLASS_OF_MODEL.get(kind) if isinstance(kind, str) else None)
    return str(name or "").removesuffix("Fast").removesuffix("Tokenizer")


def _is_named(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("name"), str) and item.get("template") is not None


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can write halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _values(tokens: Any) -> list[Any]:
    if isinstance(tokens, dict):  # names of our own to texts, as newer files write it
        return list(tokens.values())
    return tokens if isinstance(tokens, list) else []


def _text(token: Any, where: object, name: str) -> str | None:
    """A special token is a string, or an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not (isinstance(text, str) and _is_unicode(text)):
        raise UserError(f"{where}: {name} must be a token's text, got {token!r:.100}")
    return text


def _flag(settings: dict[str, Any], key: str, where: object) -> bool | None:
    value = settings.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"{where}: {key} must be true or false, got {value!r:.100}")
    return value


def _added(added: dict[str, Any], special: Collection[str], directory: Path) -> dict[int, AddedToken]:
    """added_tokens.json: ids by text."""
    path, names = directory / "added_tokens.json", dict[int, str]()
    for content, index in added.items():
        if type(index) is not int or index < 0:
            raise UserError(f"{path}: the id of {content!r:.100} is not a number from 0 on")
        if index in names:
            raise UserError(f"{path}: {names[index]!r:.100} and {content!r:.100} have the same id {index}")
        names[index] = content
    return {index: AddedToken(content, special=content in special) for content, index in added.items()}


def _decoder(settings: dict[str, Any], special: Collection[str], path: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: tokens with their flags by id."""
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: added_tokens_decoder must be an object of ids and tokens")
    found: dict[int, AddedToken] = {}
    for index, token in entries.items():
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_token or not _TOKEN_ID.fullmatch(index):
            raise UserError(f"{path}: added_tokens_decoder entry {index!r:.100} is malformed")
        flags = {name: token.get(name) is True for name in _FLAGS}
        flags["special"] = flags["special"] or token["content"] in special
        found[int(index)] = AddedToken(token["content"], **flags)
    return found
