"""`tokenizer.json` made from a SentencePiece BPE vocabulary (Llama 1 and 2, Mistral, Yi): the same ids, text for text.

SentencePiece normalises a text, puts a blank in front, writes blanks as U+2581, cuts out user-defined symbols and
merges the rest by score. A `tokenizers` normaliser does all but the cutting; symbols are added tokens that are matched
in the normalised text. Special tokens are Hugging Face's affair: they are found first, and what follows one is a text
of its own with its own blank in front (`legacy`), or without one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dvi_jax.data.tokenizer_file import SYMBOL_MARK, without_prefix_before
from dvi_jax.errors import UserError
from dvi_jax.importing.sentencepiece_file import has_rule
from dvi_jax.importing.tokenizer_build import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    AddedToken,
    Vocabulary,
    bpe_model,
    document,
)

_SPACE = "\u2581"
_JAMO = "\u1100\u1161"  # composed by NFC and NFKC
# Finding the merges looks at every cut of every piece.
_MAX_PIECE, _MAX_MERGES = 256, 1 << 20


@dataclass(frozen=True)
class Normalization:
    """What happens to a text before it is cut: SentencePiece's `normalizer_spec` and Hugging Face's `legacy`.

    `charsmap`: the compiled rules (nfkc and the like), empty for none. `match_symbols_late`: user-defined symbols are
    looked for in the normalised text, as SentencePiece does, not in the text as it came, as llama.cpp does.
    """

    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    legacy: bool = True
    match_symbols_late: bool = False


def sentencepiece_bpe(
    vocabulary: Vocabulary,
    scores: Sequence[float],
    rules: Normalization,
    added: Mapping[int, AddedToken] | None = None,
) -> str:
    """The text of tokenizer.json: spaces as U+2581, unknown characters as bytes, merges by score.

    `added`: tokens by id that are kept beside the vocabulary, or that Hugging Face's files claim for themselves.
    """
    if len(scores) != len(vocabulary.tokens):
        raise UserError(f"the tokenizer has {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    pairs = list(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    unknown = next((token for token, kind in pairs if kind == UNKNOWN), None)
    added = {i: token for i, token in (added or {}).items() if i >= len(pairs) or pairs[i][1] in (NORMAL, USER_DEFINED)}
    special = [token for token, kind in pairs if kind in (UNKNOWN, CONTROL)]
    special += [token.content for token in added.values()]
    late = [token for token, kind in pairs if kind == USER_DEFINED] if rules.match_symbols_late else []
    symbols = set(late).difference(special)
    model = bpe_model(vocabulary, _merges_from_scores(vocabulary, scores), unk_token=unknown, byte_fallback=True)
    content = json.loads(
        document(
            vocabulary,
            model | {"fuse_unk": True},
            normalizer={"type": "Sequence", "normalizers": _normalizers(rules, special, bool(symbols))},
            decoder={"type": "Sequence", "decoders": _decoders(rules, bool(symbols))},
        )
    )
    if symbols:
        _match_late(content, symbols, rules.add_dummy_prefix)
    given = {token["id"]: token for token in content["added_tokens"]}
    given |= {index: token.to_json(index) for index, token in added.items()}
    content["added_tokens"] = [given[index] for index in sorted(given)]
    for token in content["added_tokens"]:
        token["normalized"] = token["normalized"] or not rules.legacy
    return json.dumps(content, ensure_ascii=False)


def _normalizers(rules: Normalization, special: Sequence[str], has_symbols: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if rules.charsmap:
        # The library applies rules to short clusters as a whole and to longer ones letter by letter, so what letters
        # are composed of is put together before. A compatibility form (a Roman numeral, say) with an accent of its own
        # may still come out otherwise than in SentencePiece.
        if has_rule(rules.charsmap, _JAMO):
            steps.append({"type": "NFC"})
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules.charsmap).decode()})
    if rules.remove_extra_whitespaces:
        steps += [_replace_all(rf"\A +|[ {_SPACE}]+\z", ""), _replace_all(" {2,}", " ")]
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    if has_symbols and rules.add_dummy_prefix:
        steps.append({"type": "Replace", "pattern": {"String": _SPACE + SYMBOL_MARK}, "content": ""})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    if rules.add_dummy_prefix and not rules.legacy:
        steps.append(without_prefix_before(special))
    return steps


def _decoders(rules: Normalization, has_symbols: bool) -> list[dict[str, Any]]:
    mark = {"type": "Replace", "pattern": {"String": SYMBOL_MARK}, "content": ""}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [
        *([mark] if has_symbols and rules.add_dummy_prefix else []),
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if rules.add_dummy_prefix else []),
    ]


def _replace_all(regex: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def _match_late(content: dict[str, Any], symbols: set[str], is_marked: bool) -> None:
    """Look for `symbols` in normalised text.

    The library normalises a token before it looks for it, so one that must not get the blank in front has a mark
    there, which takes the blank away; the vocabulary knows it under that name.
    """
    names = {symbol: SYMBOL_MARK + symbol if is_marked else symbol for symbol in symbols}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): index for token, index in vocab.items()}
    for token in content["added_tokens"]:
        if token["content"] in symbols:
            token |= {"content": names[token["content"]], "normalized": True}


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[str]:
    """SentencePiece keeps none: each split of a piece into two pieces is one, best-scored piece first."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if vocabulary.kinds[index] == NORMAL}
    found: list[tuple[float, int, int, int, str]] = []
    for piece, index in ids.items():
        if len(piece) > _MAX_PIECE or len(found) > _MAX_MERGES:
            raise UserError(f"the tokenizer has absurdly long or many pieces, such as {piece!r:.100}")
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right, f"{piece[:cut]} {piece[cut:]}"))
    return [merge for *_, merge in sorted(found)]
