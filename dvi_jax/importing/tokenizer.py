"""The tokenizer and chat template of a source: copied, or built from SentencePiece or GGUF vocabularies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dvi_jax.data.tokenizer import largest_id, load_tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing.files import parse_json_object, read_bytes, read_json_object, read_text
from dvi_jax.importing.sentencepiece_file import parse_sentencepiece
from dvi_jax.importing.tokenizer_build import Vocabulary, added_token, byte_level_bpe, sentencepiece_bpe

MAX_TOKENIZER_BYTES = 32 << 20
MAX_TEMPLATE_BYTES = 1 << 20
_CONFIG = "tokenizer_config.json"
_TOKEN_ID = re.compile("[0-9]{1,9}")


def from_directory(directory: Path, vocab_size: int) -> str | None:
    """`tokenizer.json` text of a Hugging Face directory, None where it has no tokenizer.

    A tokenizer with ids outside `vocab_size` is a `UserError`.
    """
    if (directory / "tokenizer.json").exists():
        text = _portable(read_text(directory / "tokenizer.json", MAX_TOKENIZER_BYTES), "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        text = _from_sentencepiece(directory)
    else:
        return None
    return _checked(text, vocab_size, str(directory))


def from_gguf(metadata: dict[str, Any], vocab_size: int, label: str) -> str | None:
    """`tokenizer.json` text built from GGUF metadata, None where the file has no tokenizer."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    kind = kind if isinstance(kind, str) else repr(kind)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError(f"{label}: tokenizer.ggml.tokens is missing or not a list of strings")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{label}: tokenizer model {kind!r:.100} is not known (gpt2 and llama are)")
    vocabulary = Vocabulary(
        tokens,
        _numbers(metadata, "tokenizer.ggml.token_type", label),
        metadata.get("tokenizer.ggml.bos_token_id"),
        _flag(metadata, "tokenizer.ggml.add_bos_token", kind == "llama", label),
    )
    if kind == "gpt2":
        merges, pre = metadata.get("tokenizer.ggml.merges"), metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(merges, list):
            raise UserError(f"{label}: tokenizer.ggml.merges is missing or not a list of strings")
        text = byte_level_bpe(vocabulary, merges, pre if isinstance(pre, str) else repr(pre))
    else:
        scores = _numbers(metadata, "tokenizer.ggml.scores", label)
        prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True, label)
        text = sentencepiece_bpe(vocabulary, scores, prefix)
    return _checked(text, vocab_size, label)


def chat_template(directory: Path) -> str | None:
    """The chat template of a directory: `chat_template.jinja`, or the one in `tokenizer_config.json`."""
    if (directory / "chat_template.jinja").exists():
        return read_text(directory / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if not (directory / _CONFIG).exists():
        return None
    template = read_json_object(directory / _CONFIG).get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return checked_template(template, str(directory / _CONFIG))


def checked_template(template: object, where: str) -> str | None:
    """`template` if it is absent or a string of sensible length, else a `UserError`."""
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES or not _is_unicode(template):
        raise UserError(f"{where}: the chat template must be a string of at most {MAX_TEMPLATE_BYTES >> 20} MiB")
    return template


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can write halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


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


def _from_sentencepiece(directory: Path) -> str:
    path = directory / "tokenizer.model"
    model = parse_sentencepiece(read_bytes(path, MAX_TOKENIZER_BYTES), path)
    settings = read_json_object(directory / _CONFIG) if (directory / _CONFIG).exists() else {}
    add_bos = bool(settings.get("add_bos_token", True)) and model.bos_id is not None
    vocabulary = Vocabulary(model.pieces, model.kinds, model.bos_id, add_bos)
    text = sentencepiece_bpe(vocabulary, model.scores, model.add_dummy_prefix)
    return _with_added_tokens(text, directory, settings)


def _with_added_tokens(text: str, directory: Path, settings: dict[str, Any]) -> str:
    """Add the tokens kept beside `tokenizer.model`, in `added_tokens.json` and `tokenizer_config.json`."""
    extra: dict[int, tuple[str, bool]] = {}
    if (directory / "added_tokens.json").exists():
        for content, index in read_json_object(directory / "added_tokens.json").items():
            if type(index) is not int:
                raise UserError(f"{directory / 'added_tokens.json'}: the id of {content!r:.100} is not a whole number")
            extra[index] = (content, True)
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise UserError(f"{directory / _CONFIG}: added_tokens_decoder must be an object of ids and tokens")
    for index, token in entries.items():
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_token or not _TOKEN_ID.fullmatch(index):
            raise UserError(f"{directory / _CONFIG}: added_tokens_decoder entry {index!r:.100} is malformed")
        extra[int(index)] = (token["content"], bool(token.get("special", False)))
    document = json.loads(text)
    known = {token["id"] for token in document["added_tokens"]}
    for index in sorted(set(extra) - known):
        document["added_tokens"].append(added_token(index, *extra[index]))
    return json.dumps(document, ensure_ascii=False)


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
