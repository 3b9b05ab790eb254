"""tokenizer.json: loaded so that every admitted release of the `tokenizers` library gives the same ids, or refused.

The releases differ in what they read and, worse, in what they skip without a word. What an older or newer spelling
can say, the file is made to say; what the installed release leaves out of its own description of the file is refused
by name.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers

from dvi_jax.errors import UserError

MAX_GROWTH = 16  # how many times longer the replacements of a normalizer or decoder may make a text
# Written before a symbol that is matched behind SentencePiece's dummy prefix: a noncharacter, so in nobody's text.
SYMBOL_MARK = "\ufdd0"
_SPACE = "\u2581"
# The old and the new spelling of the same setting of Metaspace; `_metaspace` writes both.
_KNOWN_SPELLINGS = {"add_prefix_space", "prepend_scheme", "split", "str_rep"}


@dataclass(frozen=True)
class TokenizerFile:
    """The library's tokenizer, and the ids that decoding leaves out because the file calls them special."""

    tokenizer: tokenizers.Tokenizer
    special_ids: frozenset[int]


def read_tokenizer(tokenizer_json: str) -> TokenizerFile:
    """The tokenizer of a file's text, without truncation and padding; raises `UserError` for a damaged or hostile one.

    Also for one that asks for something that the installed release of `tokenizers` cannot do.
    """
    try:
        description = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer.json is not valid JSON: {error}") from None
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise UserError("tokenizer.json must be an object with a model")
    special = frozenset(
        token["id"]
        for token in _added_tokens(description)
        if token.get("special") is True and type(token.get("id")) is int
    )
    is_changed = _match_added_tokens(description) | _spell_metaspace(description)
    with library_faults(f"tokenizer.json cannot be loaded by tokenizers {tokenizers.__version__}"):
        text = json.dumps(description, ensure_ascii=False) if is_changed else tokenizer_json
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()  # some files ask for a cut at 512 tokens
        tokenizer.no_padding()
    for part in ("normalizer", "decoder"):
        if _growth(description.get(part)) > MAX_GROWTH:
            raise UserError(f"tokenizer.json: its {part} would make texts more than {MAX_GROWTH} times longer")
    _refuse_what_was_skipped(description, tokenizer)
    return TokenizerFile(tokenizer, special)


def load_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """The library's tokenizer alone, as `read_tokenizer` loads it."""
    return read_tokenizer(tokenizer_json).tokenizer


def largest_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The largest id that the tokenizer can give, of its vocabulary or put around a text; -1 if it has none."""
    with library_faults("tokenizer.json cannot be used"):
        around = tokenizer.encode("", add_special_tokens=True).ids
        return max((*tokenizer.get_vocab(with_added_tokens=True).values(), *around), default=-1)


@contextlib.contextmanager
def library_faults(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a `UserError` that begins with `what`.

    It raises nothing more special than `Exception`; its panics are a `BaseException` of a class it does not export.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {str(error)[:200]}") from None


def _added_tokens(description: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = description.get("added_tokens")
    return [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []


def _match_added_tokens(description: dict[str, Any]) -> bool:
    """Have every added token matched in texts; whether that changed the description.

    Before 0.14 the library matches one that is in the vocabulary, too, only where it is special. That is otherwise a
    matter of decoding, which leaves tokens out by `special_ids`.
    """
    vocabulary = description["model"].get("vocab")
    found = [
        token
        for token in _added_tokens(description)
        if token.get("special") is False and isinstance(vocabulary, dict) and token.get("content") in vocabulary
    ]
    for token in found:
        token["special"] = True
    return bool(found)


def _spell_metaspace(description: dict[str, Any]) -> bool:
    """Write every Metaspace so that old and new releases read it; whether that changed the description."""
    parts = [part for key in ("pre_tokenizer", "decoder") for part in _metaspaces(description.get(key))]
    for part in parts:
        scheme = part.setdefault("prepend_scheme", "never" if part.get("add_prefix_space") is False else "always")
        part.setdefault("add_prefix_space", scheme != "never")
    pre = description.get("pre_tokenizer")
    if isinstance(pre, dict) and pre.get("type") == "Metaspace" and not _has_newer_metaspace():
        _as_normalizer(description, pre)
    return bool(parts)


def _metaspaces(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if part.get("type") == "Metaspace":
            yield part
        for inner in part.values():
            yield from _metaspaces(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _metaspaces(inner)


def _has_newer_metaspace() -> bool:
    """Whether the installed Metaspace can put its blank before the first piece of a text only, and can leave it whole.

    The one is older releases' lack (before 0.15), the other also that of some later ones; they skip the setting.
    """
    metaspace = tokenizers.pre_tokenizers.Metaspace()
    return all(hasattr(metaspace, setting) for setting in ("prepend_scheme", "split"))


def _as_normalizer(description: dict[str, Any], pre: dict[str, Any]) -> None:
    """Say with normalizers what an old release's Metaspace cannot: the blank in front, and no cut at blanks."""
    scheme, is_split = pre["prepend_scheme"], pre.get("split", True) is not False
    is_known = scheme in ("first", "always", "never") and pre.get("replacement") == _SPACE
    if (scheme != "first" and is_split) or not is_known:
        return
    if description.get("normalizer") is not None:
        raise UserError(
            f"tokenizer.json: tokenizers {tokenizers.__version__} knows neither prepend_scheme={scheme!r} nor split="
            f"{is_split} of Metaspace behind a normalizer: install tokenizers 0.20 or newer"
        )
    tokens = _added_tokens(description)
    for token in tokens:
        token["normalized"] = scheme == "first"
    contents = [str(token.get("content")) for token in tokens] if scheme == "first" else []
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if scheme != "never":
        steps += [{"type": "Prepend", "prepend": _SPACE}, without_prefix_before([_SPACE, *contents])]
    description["normalizer"] = {"type": "Sequence", "normalizers": steps}
    cut = {"type": "Metaspace", "replacement": _SPACE, "add_prefix_space": False, "prepend_scheme": "never"}
    description["pre_tokenizer"] = cut if is_split else None


def without_prefix_before(contents: Iterable[str]) -> dict[str, Any]:
    """A normalizer that takes the blank in front of a text away again where one of `contents` follows."""
    found = "|".join(_escaped(content.replace(" ", _SPACE)) for content in contents)
    return {"type": "Replace", "pattern": {"Regex": rf"\A{_SPACE}(?={found})"}, "content": ""}


def _escaped(text: str) -> str:
    """`text` as a regular expression of the library's engine (Oniguruma) that matches just that."""
    return "".join(f"\\{letter}" if letter in r"\.[]{}()*+-?^$|/#&~" else letter for letter in text)


def _refuse_what_was_skipped(description: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
    """Raise `UserError` for a setting that the release left out without a word when it read the file."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part, taken = description.get(name), getattr(tokenizer, name)
        if isinstance(part, dict) and taken is not None:
            _compare(part, json.loads(taken.__getstate__()))
    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        _compare(model, json.loads(tokenizer.model.__getstate__()))
        return
    for key, value in model.items():
        if value and key not in ("type", "vocab", "merges") and not hasattr(tokenizer.model, key):
            if key == "ignore_merges" and _merges_reach_all(description, tokenizer):
                continue
            _refuse(key, value, "BPE")


def _compare(part: Any, taken: Any) -> None:
    if isinstance(part, list) and isinstance(taken, list):
        for inner, inner_taken in zip(part, taken, strict=False):
            _compare(inner, inner_taken)
    elif isinstance(part, dict) and isinstance(taken, dict):
        for key, value in part.items():
            if key in taken:
                _compare(value, taken[key])
            elif value and key not in _KNOWN_SPELLINGS:
                _refuse(key, value, part.get("type"))


def _refuse(key: str, value: Any, kind: Any) -> None:
    raise UserError(
        f"tokenizer.json: tokenizers {tokenizers.__version__} does not know {key}={value!r:.100} of {kind!r:.100} and"
        " would give other ids: install a newer tokenizers"
    )


def _merges_reach_all(description: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether merging gives every entry of the vocabulary anyway, so that looking up whole words first changes nothing.

    An added token need not be reached: it is matched before.
    """
    added = {token.get("content") for token in _added_tokens(description)}
    with library_faults("tokenizer.json cannot be used"):
        return all(
            len(tokenizer.model.tokenize(token)) == 1 for token in description["model"]["vocab"] if token not in added
        )


def _growth(part: Any) -> int:
    """How many times longer the replacements in a part of tokenizer.json can make a text."""
    if isinstance(part, list):
        return math.prod(_growth(inner) for inner in part)
    if not isinstance(part, dict):
        return 1
    inserted = [len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str)]
    return max(*inserted, 1, 1) * math.prod(_growth(inner) for inner in part.values())
