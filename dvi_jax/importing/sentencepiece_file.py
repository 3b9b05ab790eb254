"""SentencePiece's `tokenizer.model`, a protobuf message, read as far as a BPE vocabulary needs it.

Read by hand, because the two Python packages that define the message cannot be imported into one process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvi_jax.errors import UserError

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_PIECES = 1 << 20
# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BOS_ID, _EOS_ID = 3, 24, 41, 42
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
_UNUSED = 5


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by id with scores and kinds (`tokenizer_build` has the numbers); `bos_id`, `eos_id` None if absent.

    `charsmap`: compiled rules of normalisation, empty for none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(data: bytes, where: object) -> SentencePieceModel:
    """The model in `data`; a damaged message, another kind of model than BPE or an odd setting is a `UserError`."""
    try:
        return _parse(data, where)
    except (IndexError, ValueError, struct.error) as error:
        raise UserError(f"{where} is not a SentencePiece model, or is damaged: {error}") from error


def has_rule(charsmap: bytes, text: str) -> bool:
    """Whether compiled rules say something about `text`."""
    units = _double_array(charsmap)
    at, unit = 0, int(units[0])
    for byte in text.encode():
        at ^= _offset(unit) ^ byte
        unit = int(units[at])
        if unit & 0x800000FF != byte:
            return False
    return bool(unit >> 8 & 1)


def _double_array(charsmap: bytes) -> np.ndarray:
    """[n] uint32 of the double array (Darts) that compiled rules begin with: its size in bytes, its units, then texts.

    One that leads outside of itself or of the texts is a `ValueError`; the tokenizers library would panic.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4 : 4 + size - size % 4], "<u4")
    if 4 * len(units) != size or not len(units) or len(units) % 256:
        raise ValueError("its rules of normalisation are cut off")
    is_value = units >> 31 == 1
    targets = np.arange(len(units)) ^ _offset(units.astype(np.int64))
    values = units[is_value] & 0x7FFFFFFF
    if (targets[~is_value] >= len(units)).any() or (values >= len(charsmap) - 4 - size).any():
        raise ValueError("its rules of normalisation lead nowhere")
    return units


def _offset(unit: Any) -> Any:
    """How far the children of a unit, or of an array of units, are."""
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)


def _parse(data: bytes, where: object) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    denormalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(_as_bytes(value)))
            score = struct.unpack("<f", _as_bytes(piece.get(_PIECE_SCORE, bytes(4))))[0]
            text = _as_bytes(piece.get(_PIECE_TEXT, b"")).decode("utf-8")
            pieces.append((text, score, _as_int(piece.get(_PIECE_KIND, 1))))
            if len(pieces) > _MAX_PIECES:
                raise ValueError(f"it holds more than {_MAX_PIECES} pieces")
        elif number == _TRAINER:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_as_bytes(value)))
        elif number == _DENORMALIZER:
            denormalizer = dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise UserError(f"{where} is not a BPE model, as a Llama's is")
    for is_so, what in (
        (trainer.get(_WHITESPACE_AS_SUFFIX, 0), "blanks behind words (treat_whitespace_as_suffix)"),
        (not normalizer.get(_ESCAPE_WHITESPACES, 1), "blanks as they are (escape_whitespaces: false)"),
        (denormalizer.get(_CHARSMAP), "rules that change decoded text (denormalizer_spec)"),
        (any(kind == _UNUSED for *_, kind in pieces), "unused pieces"),
    ):
        if is_so:
            raise UserError(f"{where} has {what}, which are not supported")
    ids = [_as_int(trainer.get(number, default)) for number, default in ((_BOS_ID, 1), (_EOS_ID, 2))]
    # -1, "none", is a negative int32 and so a huge unsigned number here.
    bos_id, eos_id = (index if index < len(pieces) else None for index in ids)
    if charsmap := _as_bytes(normalizer.get(_CHARSMAP, b"")):
        _double_array(charsmap)
    texts, scores, kinds = zip(*pieces, strict=True)
    return SentencePieceModel(
        texts,
        scores,
        kinds,
        bos_id,
        eos_id,
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message; fixed-size values come as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {kind} at byte {position}")
        if size > len(data) - position:
            raise ValueError(f"it ends inside a field at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number longer than 10 bytes before byte {position}")


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value
