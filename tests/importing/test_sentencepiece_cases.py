"""SentencePiece models with a normaliser, user-defined symbols or `legacy: false`: SentencePiece's own ids."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing import tokenizer as source
from dvi_jax.importing.sentencepiece_file import parse_sentencepiece

pytestmark = pytest.mark.tokenizers
CORPUS = ["The quick brown fox jumps over the lazy dog.", "  two  blanks\nand lines\n\n", "naïve café 123"] * 20
TEXTS = (
    *("", " ", "   ", "hello", " lead", "trail ", "two  blanks   here", "tab\tnew\nline\n\nend", "\u2581mark \u2581"),
    *("<sep>a<sep> b", "\n", "<sep>", "  <sep>", "a\n\n\nb", "fox", "▁<sep>", "<sep><sep>x  ", "\n\n lead"),
    *(
        "\ufb01ne \u2460 \uff21\uff22 e\u0301 \u212b \u00bd",
        "\u3000wide\u00a0blank",
        "\uac00 \u1100\u1161",
        "ΑΒΓ Straße İ",
    ),
    *("zero\u200bwidth", "\u0130i\u0307", "\U0001d400 \u2167 \u33a5", "\ud55c\uae00"),
)


def trained(**options) -> bytes:
    output = io.BytesIO()
    defaults = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=output,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **defaults | options,
    )
    return output.getvalue()


def both(tmp_path, model: bytes, **settings) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return Tokenizer(source.from_directory(tmp_path, 400)), processor


SYMBOLS = ["\u2581\u2581", "\u2581\n", "<sep>", "\n"]


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": SYMBOLS},
        {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
        {"user_defined_symbols": ["<sep>"], "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_every_setting(tmp_path, options, legacy):
    ours, theirs = both(tmp_path, trained(**options), legacy=legacy)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


def test_symbols_are_shown_and_found_by_name(tmp_path):
    ours, theirs = both(tmp_path, trained(user_defined_symbols=SYMBOLS))
    for text in ("<sep>a  b\n<sep>", "\n", "a<sep>\u00e9"):
        assert ours.decode(theirs.encode(text)) == text
    assert ours.token_id("<sep>") == theirs.piece_to_id("<sep>")
    assert ours.is_shown(theirs.piece_to_id("<sep>"))


@pytest.mark.parametrize("legacy", [True, False])
def test_text_behind_a_special_token(tmp_path, legacy):
    """It gets a blank in front in the old way only."""
    ours, theirs = both(tmp_path, trained(), legacy=legacy)
    prefix, bare = theirs.encode("fox"), theirs.encode("\nfox")[2:]  # behind a line break: no blank
    assert theirs.encode("\nfox")[0] == theirs.piece_to_id("\u2581")
    assert prefix != bare
    assert ours.encode("fox</s>fox") == [*prefix, 2, *(prefix if legacy else bare)]
    assert ours.encode("</s>fox") == [2, *(prefix if legacy else bare)]


def test_symbols_that_hugging_face_claims_are_special_tokens(tmp_path):
    entry = {"content": "<sep>", "special": True}
    ours, theirs = both(tmp_path, trained(user_defined_symbols=["<sep>"]), added_tokens_decoder={"3": entry})
    assert ours.encode("fox<sep>fox") == [*theirs.encode("fox"), 3, *theirs.encode("fox")]
    assert not ours.is_shown(3)


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"bos_token": "<|im_start|>"}, [3]),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, []),
        ({"bos_token": "<new>"}, [320]),
        ({"bos_token": "<new>", "tokenizer_class": "YiTokenizer"}, [320]),
        ({"tokenizer_class": "YiTokenizer", "add_eos_token": False}, [1]),
    ],
)
def test_bos_is_the_one_that_tokenizer_config_names(tmp_path, settings, begin):
    ours, theirs = both(tmp_path, trained(control_symbols=["<|im_start|>"]), **settings)
    assert ours.encode("hello", add_special_tokens=True) == [*begin, *theirs.encode("hello")]


def test_bos_of_a_model_whose_name_is_not_hugging_faces(tmp_path):
    ours, theirs = both(tmp_path, trained(bos_piece="<|begin|>"))
    assert ours.encode("hello", add_special_tokens=True) == [1, *theirs.encode("hello")]


def test_eos_around_a_text(tmp_path):
    ours, theirs = both(tmp_path, trained(), add_eos_token=True)
    assert ours.encode("fox", add_special_tokens=True) == [1, *theirs.encode("fox"), 2]


def test_what_cannot_be_honoured_is_refused_by_name():
    with pytest.raises(UserError, match="treat_whitespace_as_suffix"):
        parse_sentencepiece(trained(treat_whitespace_as_suffix=True), "test")
    denormalizer = b"\x2a\x03\x12\x01x"  # field 5 with a charsmap of one byte
    with pytest.raises(UserError, match="denormalizer_spec"):
        parse_sentencepiece(trained() + denormalizer, "test")
    for rules in (b"\x00\x04\x00\x00" + bytes(1000), b"\x00\x04\x00\x00" + b"\x00\xfc\xff\x7f" * 256 + b"\0"):
        size = len(rules)
        normalizer = b"\x12" + bytes([size & 127 | 128, size >> 7]) + rules
        message = b"\x1a" + bytes([len(normalizer) & 127 | 128, len(normalizer) >> 7]) + normalizer
        with pytest.raises(UserError, match="is damaged: its rules of normalisation"):
            parse_sentencepiece(trained() + message, "test")
    unused = b"\x0a\x0a\x0a\x01q\x15\x00\x00\x00\x00\x18\x05"  # a piece of kind 5
    with pytest.raises(UserError, match="unused pieces"):
        parse_sentencepiece(trained() + unused, "test")
