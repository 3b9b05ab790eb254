"""`tokenizer.json` made from a bare vocabulary: byte-level BPE (GPT-2 family) and SentencePiece BPE.

The JSON is written directly, in the form that every tokenizers release from 0.13 on reads: merges as strings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dvi_jax.errors import UserError

# Kinds of vocabulary entries; SentencePiece and GGUF use the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Far more than any Llama's tokenizer has; finding the merges looks at every cut of every piece.
_MAX_CHARACTERS, _MAX_PIECE, _MAX_MERGES = 1 << 22, 256, 1 << 20

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """Entries by id, with their kinds; `bos_id` is put before every text when `add_bos`."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    bos_id: int | None = None
    add_bos: bool = False

    def __post_init__(self) -> None:
        if sum(map(len, self.tokens)) > _MAX_CHARACTERS:
            raise UserError(f"a vocabulary of more than {_MAX_CHARACTERS} characters is absurd")
        if len(self.kinds) != len(self.tokens):
            raise UserError(f"the tokenizer has {len(self.tokens)} tokens but {len(self.kinds)} token types")
        seen: set[str] = set()
        for token in self.tokens:
            if token in seen:
                raise UserError(f"the tokenizer's vocabulary holds {token!r:.100} twice")
            seen.add(token)
        if self.add_bos and not (type(self.bos_id) is int and 0 <= self.bos_id < len(self.tokens)):
            raise UserError(f"the tokenizer adds a bos token, but its id {self.bos_id} is not in the vocabulary")


def byte_level_bpe(vocabulary: Vocabulary, merges: Sequence[str], pre: str) -> str:
    """GPT-2 style tokenizer; `pre` is GGUF's name of the splitting rule: `smollm`, `llama-bpe`, `gpt-2`."""
    pre_tokenizer = _pre_tokenizer(pre)
    # Llama 3's vocabulary holds words that no merges lead to: whole words are looked up first.
    extra = {"ignore_merges": True} if pre in _LLAMA3_NAMES else {}
    model = _bpe(vocabulary, list(merges), unk_token=None, byte_fallback=False) | extra
    return _document(vocabulary, model, pre_tokenizer=pre_tokenizer, decoder=_byte_level(True))


def sentencepiece_bpe(vocabulary: Vocabulary, scores: Sequence[float], add_prefix_space: bool) -> str:
    """Llama 1 and 2 style tokenizer: spaces as U+2581, unknown characters as bytes, merges by score."""
    if len(scores) != len(vocabulary.tokens):
        raise UserError(f"the tokenizer has {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == UNKNOWN), None)
    model = _bpe(vocabulary, _merges_from_scores(vocabulary, scores), unk_token=unknown, byte_fallback=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if add_prefix_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return _document(
        vocabulary,
        model | {"fuse_unk": True},
        normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _pre_tokenizer(pre: str) -> dict[str, Any]:
    if pre == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, _byte_level(True)]}
    if pre in (*_LLAMA3_NAMES, *_QWEN2_NAMES):
        # Qwen2 takes the digits of a number one by one.
        pattern = _LLAMA3_SPLIT.replace("{1,3}", "") if pre in _QWEN2_NAMES else _LLAMA3_SPLIT
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}
    if pre in ("gpt-2", "default"):
        return _byte_level(True)
    raise UserError(
        f"pre-tokenizer {pre!r:.100} is not known (smollm, llama-bpe, qwen2 and gpt-2 are); import from Hugging Face"
    )


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[str]:
    """SentencePiece keeps none: each split of a piece into two pieces is one, best-scored piece first."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    found: list[tuple[float, int, int, int, str]] = []
    for index, piece in enumerate(vocabulary.tokens):
        if vocabulary.kinds[index] != NORMAL:
            continue
        if len(piece) > _MAX_PIECE or len(found) > _MAX_MERGES:
            raise UserError(f"the tokenizer has absurdly long or many pieces, such as {piece!r:.100}")
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right, f"{piece[:cut]} {piece[cut:]}"))
    return [merge for *_, merge in sorted(found)]


def _bpe(vocabulary: Vocabulary, merges: list[str], unk_token: str | None, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """An `added_tokens` entry: `content` is one token wherever it occurs."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def _document(
    vocabulary: Vocabulary,
    model: dict[str, Any],
    *,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
) -> str:
    added = [
        added_token(index, token, special=kind != USER_DEFINED)
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _bos_template(vocabulary) if vocabulary.add_bos else None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False)


def _bos_template(vocabulary: Vocabulary) -> dict[str, Any]:
    index = vocabulary.bos_id or 0
    token = vocabulary.tokens[index]

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        bos = {"SpecialToken": {"id": token, "type_id": type_id}}
        return [bos, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
