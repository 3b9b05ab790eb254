"""`tokenizer.json` made from a bare vocabulary of byte-level BPE (GPT-2 family), and the parts that all kinds share.

The JSON is written directly, in the form that every tokenizers release from 0.13 on reads: merges as strings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dvi_jax.errors import UserError

# Kinds of vocabulary entries; SentencePiece and GGUF use the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

_MAX_CHARACTERS = 1 << 22  # far more than any Llama's tokenizer has

# How a text is cut into words: GGUF's names of the rules, and the expressions of the original tokenizers.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
TEKKEN = "tekken"  # Mistral Nemo
_DIGIT_NAMES = ("smollm", "refact", "starcoder")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS = {
    **dict.fromkeys(LLAMA3_NAMES, rf"{_ENDINGS}|\p{{N}}{{1,3}}|{_REST}"),
    **dict.fromkeys(_QWEN2_NAMES, rf"{_ENDINGS}|\p{{N}}|{_REST}"),
    TEKKEN: rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_GPT2_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# What llama.cpp does with a file that names no rule, one cut after the other.
_DEFAULT_CUTS = (r"[\p{P}$+<=>^~|]+", _GPT2_WORD, r"\p{N}+", "[0-9]{3}")


@dataclass(frozen=True)
class AddedToken:
    """One token wherever its text occurs; `special`: decoding leaves it out. The rest as in `tokenizers`."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def to_json(self, index: int) -> dict[str, Any]:
        """The entry of tokenizer.json's `added_tokens`."""
        return {"id": index, **asdict(self)}


@dataclass(frozen=True)
class Vocabulary:
    """Entries by id, with their kinds; `bos_id` and `eos_id` go around every text when `add_bos` and `add_eos`."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    bos_id: int | None = None
    add_bos: bool = False
    eos_id: int | None = None
    add_eos: bool = False

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
        for name, index, is_added in (("a bos", self.bos_id, self.add_bos), ("an eos", self.eos_id, self.add_eos)):
            if is_added and not (type(index) is int and 0 <= index < len(self.tokens)):
                raise UserError(f"the tokenizer adds {name} token, but its id {index} is not in the vocabulary")

    def before(self) -> list[int]:
        """Ids put before a text."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    def after(self) -> list[int]:
        """Ids put behind a text."""
        return [self.eos_id] if self.add_eos and self.eos_id is not None else []


def byte_level_bpe(vocabulary: Vocabulary, merges: Sequence[str], pre: str) -> str:
    """GPT-2 style tokenizer; `pre` is GGUF's name of the splitting rule, such as `smollm`, `llama-bpe`, `qwen2`."""
    pre_tokenizer = _pre_tokenizer(pre)
    # Llama 3's vocabulary holds words that no merges lead to: whole words are looked up first.
    extra = {"ignore_merges": True} if pre in (*LLAMA3_NAMES, TEKKEN) else {}
    _check_merges(vocabulary, merges)
    model = bpe_model(vocabulary, list(merges), unk_token=None, byte_fallback=False) | extra
    normalizer = {"type": "NFC"} if pre in _QWEN2_NAMES else None
    return document(vocabulary, model, normalizer=normalizer, pre_tokenizer=pre_tokenizer, decoder=_byte_level(True))


def _check_merges(vocabulary: Vocabulary, merges: Sequence[str]) -> None:
    known = set(vocabulary.tokens)
    for merge in merges:
        left, _, right = merge.partition(" ")
        absent = next((token for token in (left, right, left + right) if token not in known), None)
        if absent is not None:
            raise UserError(
                f"the tokenizer cannot be loaded: its merge {merge!r:.100} needs the token {absent!r:.100},"
                " which its vocabulary lacks"
            )


def _pre_tokenizer(pre: str) -> dict[str, Any]:
    if pre in _DIGIT_NAMES:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, _byte_level(True)]}
    cuts = (_SPLITS[pre],) if pre in _SPLITS else _DEFAULT_CUTS if pre == "default" else ()
    if cuts:
        isolated = {"behavior": "Isolated", "invert": False}
        splits = [{"type": "Split", "pattern": {"Regex": cut}, **isolated} for cut in cuts]
        return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(False)]}
    if pre == "gpt-2":
        return _byte_level(True)
    known = ", ".join([*_DIGIT_NAMES, *_SPLITS, "gpt-2", "default"])
    raise UserError(f"pre-tokenizer {pre!r:.100} is not known ({known} are); import from Hugging Face")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def bpe_model(vocabulary: Vocabulary, merges: list[str], unk_token: str | None, byte_fallback: bool) -> dict[str, Any]:
    """The `model` of tokenizer.json."""
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


def document(
    vocabulary: Vocabulary,
    model: dict[str, Any],
    *,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
) -> str:
    """The text of tokenizer.json; entries of the vocabulary that are not normal ones are matched in a text as such."""
    added = [
        AddedToken(token, special=kind != USER_DEFINED).to_json(index)
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    before, after = ([(i, vocabulary.tokens[i]) for i in ids] for ids in (vocabulary.before(), vocabulary.after()))
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": around_text(before, after),
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def around_text(before: Sequence[tuple[int, str]], after: Sequence[tuple[int, str]]) -> dict[str, Any] | None:
    """The post-processor that puts tokens (id, text) around every text; None for none."""
    if not before and not after:
        return None

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        first, last = ([{"SpecialToken": {"id": text, "type_id": type_id}} for _, text in ts] for ts in (before, after))
        return [*first, {"Sequence": {"id": sequence, "type_id": type_id}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for index, text in [*before, *after]},
    }
