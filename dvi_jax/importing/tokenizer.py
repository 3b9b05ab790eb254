"""The tokenizer of a source as `tokenizer.json`: copied and completed, or built from another kind of vocabulary."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.data.tokenizer_file import largest_id, load_tokenizer
from dvi_jax.errors import UserError, notice
from dvi_jax.importing.end_tokens import END_TEXTS
from dvi_jax.importing.files import parse_json_object, read_bytes, read_json_object, read_text
from dvi_jax.importing.sentencepiece_build import Normalization, sentencepiece_bpe
from dvi_jax.importing.sentencepiece_file import parse_sentencepiece
from dvi_jax.importing.tokenizer_build import CONTROL, LLAMA3_NAMES, NORMAL, TEKKEN, Vocabulary, byte_level_bpe
from dvi_jax.importing.tokenizer_complete import complete, stated_tokens, without_tokens_beyond
from dvi_jax.importing.tokenizer_config import (
    TokenizerConfig,
    chat_template,
    gguf_chat_template,
    read_tokenizer_config,
)

__all__ = ["chat_template", "from_directory", "from_gguf", "gguf_chat_template", "gguf_special_tokens", "token_text"]

MAX_TOKENIZER_BYTES = 32 << 20
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
_NO_VOCABULARY = ("none", "no_vocab")  # what converters write for a model without a tokenizer
_GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Which splitting rule a vocab.json belongs to, by the class of tokenizer ("" is a generic one).
_FAMILIES = {"": "gpt-2", "GPT2": "gpt-2", "PreTrained": "gpt-2", "Llama": "gpt-2", "Qwen2": "qwen2"}


def from_directory(directory: Path, vocab_size: int) -> str | None:
    """`tokenizer.json` text of a Hugging Face directory, None where it has no tokenizer.

    Added tokens with ids outside `vocab_size` are left out, which a line on stderr says; others are a `UserError`.
    """
    config = read_tokenizer_config(directory)
    if (directory / "tokenizer.json").exists():
        text = _portable(read_text(directory / "tokenizer.json", MAX_TOKENIZER_BYTES), "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        text, config = _from_sentencepiece(directory / "tokenizer.model", config)
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        text = _from_merges(directory, config)
    else:
        return None
    return _checked(complete(text, config), vocab_size, str(directory))


def special_tokens(directory: Path) -> dict[str, str]:
    """What chat templates know as `bos_token` and so on, as far as a file says it; empty for one that is null."""
    return read_tokenizer_config(directory).special_tokens


def from_gguf(metadata: dict[str, Any], vocab_size: int, label: str) -> str | None:
    """`tokenizer.json` text built from GGUF metadata, None where the file has no tokenizer."""
    kind = metadata.get("tokenizer.ggml.model")
    kind = kind if kind is None or isinstance(kind, str) else repr(kind)
    if kind is None or kind in _NO_VOCABULARY:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError(f"{label}: tokenizer.ggml.tokens is missing or not a list of strings")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{label}: tokenizer model {kind!r:.100} is not known (gpt2 and llama are)")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pre = pre if isinstance(pre, str) else repr(pre)
    # What llama.cpp does where the file does not say.
    adds_bos = kind == "llama" or (pre in (*LLAMA3_NAMES, TEKKEN) and "tokenizer.ggml.bos_token_id" in metadata)
    bos_id = metadata.get("tokenizer.ggml.bos_token_id", 1 if kind == "llama" else None)
    kinds = _numbers(metadata, "tokenizer.ggml.token_type", label)
    vocabulary = Vocabulary(
        tokens,
        # An end of turn is one whatever its converter took it for, as in llama.cpp.
        [CONTROL if text in END_TEXTS else kind for text, kind in itertools.zip_longest(tokens[: len(kinds)], kinds)],
        bos_id,
        _flag(metadata, "tokenizer.ggml.add_bos_token", adds_bos, label),
        metadata.get("tokenizer.ggml.eos_token_id"),
        _flag(metadata, "tokenizer.ggml.add_eos_token", False, label),
    )
    if kind == "gpt2":
        merges = metadata.get("tokenizer.ggml.merges")
        if not isinstance(merges, list):
            raise UserError(f"{label}: tokenizer.ggml.merges is missing or not a list of strings")
        if "tokenizer.ggml.pre" not in metadata:
            notice(f"{label} does not say how its tokenizer cuts words: cut as llama.cpp does, perhaps not as learnt")
        text = byte_level_bpe(vocabulary, merges, pre)
    else:
        scores = _numbers(metadata, "tokenizer.ggml.scores", label)
        prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True, label)
        text = sentencepiece_bpe(vocabulary, scores, Normalization(add_dummy_prefix=prefix))
    return _checked(text, vocab_size, label)


def gguf_special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """`special_tokens` of a GGUF file: the texts of the ids that it names."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return {}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_NAMES.items()}
    return {name: tokens[index] for name, index in ids.items() if type(index) is int and 0 <= index < len(tokens)}


def report_template(tokenizer: Tokenizer) -> None:
    """Say on stderr, in one line, if the chat template does not take a single user message; token ids never need it."""
    fault = tokenizer.template_fault()
    if fault is not None:
        notice(f"for a single user message {fault}; --prompt will fail like this, token ids work")


def token_text(tokenizer_json: str, index: int | None) -> str | None:
    """The text of token `index`, None where there is none."""
    tokenizer = load_tokenizer(tokenizer_json)
    is_known = index is not None and 0 <= index <= largest_id(tokenizer)
    return tokenizer.id_to_token(index) if is_known else None


def _portable(text: str, where: str) -> str:
    """Merges as strings, which all releases of tokenizers read; newer ones write pairs, unknown to 0.13."""
    document = parse_json_object(text, where)
    model = document.get("model")
    if not isinstance(model, dict):
        return text
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges or not isinstance(merges[0], list):
        return text
    if any(len(pair) != 2 or not all(isinstance(part, str) and " " not in part for part in pair) for pair in merges):
        return text
    model["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(document, ensure_ascii=False)


def _checked(text: str, vocab_size: int, where: str) -> str:
    try:
        load_tokenizer(text)  # what is no tokenizer should be called that first
        text = without_tokens_beyond(text, vocab_size, where)
        tokenizer = load_tokenizer(text)
        largest = largest_id(tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for token in json.loads(text).get("added_tokens", []):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{where}: added token {token['content']!r:.100} cannot have id {token['id']}; there is a gap"
            )
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer has token id {largest}, but the model's vocabulary is {vocab_size}; "
            "they do not belong together"
        )
    return text


def _from_sentencepiece(path: Path, config: TokenizerConfig) -> tuple[str, TokenizerConfig]:
    """Also the settings that are left to apply: which tokens go around a text is theirs to say, before the model's."""
    data = read_bytes(path, MAX_TOKENIZER_BYTES)
    if _TIKTOKEN_LINE.match(data):
        raise UserError(
            f"{path} is a tiktoken vocabulary, as of Llama 3's original: add the tokenizer.json made from it"
        )
    model = parse_sentencepiece(data, path)
    vocabulary = Vocabulary(model.pieces, model.kinds)
    rules = Normalization(
        add_dummy_prefix=model.add_dummy_prefix and config.add_prefix_space is not False,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
        charsmap=model.charsmap,
        legacy=config.legacy,
        match_symbols_late=True,
    )
    named = stated_tokens(config, {piece: index for index, piece in enumerate(model.pieces)}, config.added)
    added = config.added | named
    text = sentencepiece_bpe(vocabulary, model.scores, rules, added)
    known = {*model.pieces, *(token.content for token in added.values())}
    around = dict(config.special_tokens)
    for name, index in (("bos_token", model.bos_id), ("eos_token", model.eos_id)):
        if around.get(name) not in known and index is not None:
            around[name] = model.pieces[index]
    return text, replace(
        config,
        special_tokens=around,
        flags_given=frozenset(),  # the text has them already
        add_bos=config.add_bos is not False,
        add_eos=config.add_eos is True,
    )


def _from_merges(directory: Path, config: TokenizerConfig) -> str:
    """A byte-level tokenizer kept as vocab.json (ids by token) and merges.txt (a merge a line)."""
    if config.family not in _FAMILIES:
        known = ", ".join(f"{name}Tokenizer" for name in _FAMILIES if name)
        raise UserError(
            f"{config.where}: how a {config.family}Tokenizer cuts words is not known ({known} are): add tokenizer.json"
        )
    ids = read_json_object(directory / "vocab.json", MAX_TOKENIZER_BYTES)
    tokens = sorted(ids, key=lambda token: ids[token] if type(ids[token]) is int else -1)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(f"{directory / 'vocab.json'} must number its tokens from 0 without a gap")
    lines = read_text(directory / "merges.txt", MAX_TOKENIZER_BYTES).removeprefix("\ufeff").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    wrong = next((line for line in merges if len(line.split(" ")) != 2), None)
    if wrong is not None:
        raise UserError(f"{directory / 'merges.txt'}: {wrong!r:.100} is not two tokens with a blank between them")
    text = byte_level_bpe(Vocabulary(tokens, [NORMAL] * len(tokens)), merges, _FAMILIES[config.family])
    if config.add_prefix_space:
        document = json.loads(text)
        parts = document["pre_tokenizer"].get("pretokenizers", [document["pre_tokenizer"]])
        parts[-1]["add_prefix_space"] = True
        text = json.dumps(document, ensure_ascii=False)
    return text


def _flag(metadata: dict[str, Any], key: str, default: bool, label: str) -> bool:
    value = metadata.get(key, default)
    if type(value) not in (bool, int):
        raise UserError(f"{label}: {key} must be true or false, got {value!r:.100}")
    return bool(value)


def _numbers(metadata: dict[str, Any], key: str, label: str) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, np.ndarray):
        raise UserError(f"{label}: {key} is missing or not a list of numbers")
    return values.tolist()
