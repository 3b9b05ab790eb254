"""A tokenizer.json together with what stands beside it: added tokens, special tokens, and what goes around a text.

A file that is complete as it is stays the same to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dvi_jax.data.tokenizer_file import SYMBOL_MARK, library_faults, load_tokenizer
from dvi_jax.errors import UserError, notice
from dvi_jax.importing.files import parse_json_object
from dvi_jax.importing.tokenizer_build import AddedToken, around_text
from dvi_jax.importing.tokenizer_config import TokenizerConfig

_ADDS_BOS = ("Llama", "CodeLlama")  # classes of tokenizer that do unless told not to


def complete(text: str, config: TokenizerConfig) -> str:
    """`text` with the tokens and the special tokens around a text that `config` adds to it."""
    document = parse_json_object(text, "tokenizer.json")
    model, entries = document.get("model"), document.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(entries, list):
        return text
    if not all(isinstance(entry, dict) and type(entry.get("id")) is int for entry in entries):
        return text  # not one that a Llama has, or damaged: loading it will say so
    is_changed = _add_tokens(document, entries, vocabulary, config) | _set_prefix_space(document, config)
    if is_changed:
        document["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
        text = json.dumps(document, ensure_ascii=False)
    return _with_text_around(text, document, config)


def without_tokens_beyond(text: str, vocab_size: int, where: str) -> str:
    """`text` without the added tokens that the model has no embedding for; a line on stderr names them."""
    document = json.loads(text)
    entries = document.get("added_tokens") or []
    beyond = [entry for entry in entries if entry["id"] >= vocab_size]
    if not beyond:
        return text
    document["added_tokens"] = [entry for entry in entries if entry["id"] < vocab_size]
    vocabulary = document["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for entry in beyond:
            if vocabulary.get(entry["content"]) == entry["id"]:
                del vocabulary[entry["content"]]
    names = ", ".join(f"{entry['content']} ({entry['id']})" for entry in beyond)
    notice(f"{where}: left out {names:.500}: the model's vocabulary is {vocab_size}")
    return json.dumps(document, ensure_ascii=False)


def _add_tokens(
    document: dict[str, Any], entries: list[dict[str, Any]], vocabulary: dict[str, Any], config: TokenizerConfig
) -> bool:
    """Add to `entries` what is missing there; whether anything changed."""
    by_content = {entry.get("content"): entry for entry in entries}
    is_changed = False

    def known_as(content: str) -> str | None:
        return next((name for name in (content, SYMBOL_MARK + content) if name in by_content), None)

    def add(index: int, token: AddedToken) -> None:
        nonlocal is_changed
        by_content[token.content] = token.to_json(index)
        entries.append(by_content[token.content])
        is_changed = True

    for index in sorted(config.added):
        token, name = config.added[index], known_as(config.added[index].content)
        if name is None:
            add(index, token)
        elif name == token.content and index in config.flags_given and _differs(by_content[name], token, index):
            by_content[name].update(token.to_json(index))
            is_changed = True
    missing = [text for text in config.stated if known_as(text) is None]
    # What a class of tokenizer has without saying so need not be in this vocabulary.
    missing += [text for text in config.defaults.values() if known_as(text) is None and text in vocabulary]
    for index, token in stated_tokens(
        replace(config, stated=tuple(dict.fromkeys(missing))), vocabulary, {entry["id"] for entry in entries}
    ).items():
        add(index, token)
    return is_changed


def _set_prefix_space(document: dict[str, Any], config: TokenizerConfig) -> bool:
    """A GPT-2 tokenizer's `add_prefix_space` overrules the file, also by its default; whether that changed anything."""
    pre, wanted = document.get("pre_tokenizer"), config.add_prefix_space is True
    if config.family != "GPT2" or not isinstance(pre, dict) or pre.get("type") != "ByteLevel":
        return False
    if pre.get("add_prefix_space", True) is wanted:
        return False
    pre["add_prefix_space"] = wanted
    return True


def stated_tokens(
    config: TokenizerConfig, vocabulary: Mapping[str, Any], taken: Collection[int]
) -> dict[int, AddedToken]:
    """The special tokens that `config` names, by their ids in `vocabulary` or else by the next ones free.

    Those of `config.added` are left out: they have ids.
    """
    ids = [index for index in vocabulary.values() if type(index) is int]
    following, found = 1 + max([*ids, *taken], default=-1), {}
    for content in config.stated:
        if all(token.content != content for token in config.added.values()):
            index = vocabulary.get(content)
            if type(index) is not int:
                index, following = following, following + 1
            found[index] = AddedToken(content, special=True)
    return found


def _differs(entry: dict[str, Any], token: AddedToken, index: int) -> bool:
    """Whether a token has other flags in tokenizer_config.json; another id is a fault, which checking finds."""
    if entry["id"] != index:
        raise UserError(f"added token {token.content!r:.100} has ids {entry['id']} and {index} in two files")
    stated = token.to_json(index)
    return any(entry.get(flag) is not value for flag, value in stated.items() if type(value) is bool)


def _with_text_around(text: str, document: dict[str, Any], config: TokenizerConfig) -> str:
    """`add_bos_token` and `add_eos_token` overrule the file; without both, a Llama's file that is silent adds bos."""
    adds_bos, is_silent = config.family in _ADDS_BOS, document.get("post_processor") is None
    if config.add_bos is None and config.add_eos is None and not (adds_bos and is_silent):
        return text
    tokenizer = load_tokenizer(text)
    before = _token(tokenizer, config, "bos_token") if (adds_bos if config.add_bos is None else config.add_bos) else []
    after = _token(tokenizer, config, "eos_token") if config.add_eos else []
    with library_faults("tokenizer.json cannot be used"):
        around, alone = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    if around == [*(i for i, _ in before), *alone, *(i for i, _ in after)]:
        return text
    return json.dumps({**document, "post_processor": around_text(before, after)}, ensure_ascii=False)


def _token(tokenizer: Any, config: TokenizerConfig, name: str) -> list[tuple[int, str]]:
    """(id, text) of a special token, none where the vocabulary does not have it."""
    content = config.special_tokens.get(name, config.defaults.get(name, ""))
    index = tokenizer.token_to_id(content)
    return [] if index is None else [(index, content)]
