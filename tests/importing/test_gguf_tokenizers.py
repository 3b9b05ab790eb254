"""Tokenizers inside GGUF files: the ids, the ends of a generation and the templates that llama.cpp would have."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing import tokenizer as source
from dvi_jax.importing.end_tokens import end_ids

pytestmark = pytest.mark.tokenizers
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def gguf(kinds: dict[str, int], **keys) -> dict:
    """Metadata of a GGUF file with a byte-level tokenizer whose last tokens are `kinds`."""
    tokens = [*BYTES, "he", *kinds]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 257 + list(kinds.values()), np.int32),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.pre": "gpt-2",
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_user_defined_tokens_of_a_gguf_are_whole():
    tokenizer = Tokenizer(source.from_gguf(gguf({"<|im_start|>": 4, "<|im_end|>": 3}), 300, "test"))
    ids = tokenizer.encode("<|im_start|>he<|im_end|>")
    assert ids == [257, 256, 258]
    assert tokenizer.decode(ids) == "<|im_start|>he"  # a control token is special, a user's is text


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_an_end_of_turn_is_one_whatever_its_converter_took_it_for(kind):
    tokenizer = Tokenizer(source.from_gguf(gguf({"<|im_end|>": kind}), 300, "test"))
    assert tokenizer.encode("he<|im_end|>") == [256, 257]
    assert tokenizer.decode([256, 257]) == "he"
    longer = gguf({"<|im_end|>": kind}) | {"tokenizer.ggml.token_type": np.ones(300, np.int32)}
    with pytest.raises(UserError, match="258 tokens but 300 token types"):
        source.from_gguf(longer, 300, "test")


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_a_gguf_that_says_it_has_no_tokenizer(kind):
    assert source.from_gguf({"tokenizer.ggml.model": kind}, 300, "test") is None


def test_named_templates_of_a_gguf():
    key, named = "tokenizer.chat_template", {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "r"}
    assert source.gguf_chat_template({}, "test") is None
    assert source.gguf_chat_template(named | {key: "d"}, "test") == "d"
    assert source.gguf_chat_template(named | {f"{key}.default": "d"}, "test") == "d"
    with pytest.raises(UserError, match=r"^test: its chat templates are named rag, and none of them default; tok"):
        source.gguf_chat_template(named, "test")
    with pytest.raises(UserError, match=r"^test: the chat template must be a string"):
        source.gguf_chat_template({key: 3}, "test")


def test_a_gguf_without_a_splitting_rule_is_cut_as_by_llama_cpp(capsys):
    metadata = gguf({})
    del metadata["tokenizer.ggml.pre"]
    tokenizer = Tokenizer(source.from_gguf(metadata, 300, "test"))
    assert capsys.readouterr().err.startswith("note: test does not say how its tokenizer cuts words: cut as llama.cpp")
    cut = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345, a=b  x")
    assert [piece for piece, _ in cut] == [
        "it",
        "'",
        "s",
        "\u0120",
        "123",
        "45",
        ",",
        "\u0120a",
        "=",
        "b",
        "\u0120",
        "\u0120x",
    ]
    named = Tokenizer(source.from_gguf(metadata | {"tokenizer.ggml.pre": "default"}, 300, "test"))
    assert (named.encode("it's 1"), capsys.readouterr().err) == (tokenizer.encode("it's 1"), "")


def test_ends_of_a_gguf_by_name_and_by_text():
    metadata = gguf({"<|end_of_text|>": 3, "<|eot_id|>": 3, "<|begin_of_text|>": 3}, eos_token_id=257)
    assert end_ids(metadata, 300, "test") == [257, 258]
    assert end_ids({"tokenizer.ggml.model": "llama"}, 300, "test") == [2]
    assert end_ids(gguf({"<|im_end|>": 4}), 300, "test") == [257]
    with pytest.raises(UserError, match="eot_token_id 300 is outside the vocabulary of 300"):
        end_ids(gguf({}, eot_token_id=300), 300, "test")


@pytest.mark.parametrize(
    ("pre", "keys", "adds"),
    [
        ("llama-bpe", {"bos_token_id": 257}, True),
        ("llama-bpe", {"bos_token_id": 257, "add_bos_token": False}, False),
        ("llama-bpe", {}, False),
        ("qwen2", {"bos_token_id": 257}, False),
        ("smollm", {"bos_token_id": 257, "add_bos_token": True}, True),
    ],
)
def test_bos_of_a_gguf_by_its_splitting_rule(pre, keys, adds):
    tokenizer = Tokenizer(source.from_gguf(gguf({"<b>": 3}, pre=pre, **keys), 300, "test"))
    assert tokenizer.encode("he", add_special_tokens=True) == ([257, 256] if adds else [256])
