"""What the data tests share: a tokenizer whose tokens are bytes."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders as token_decoders
from tokenizers import models, pre_tokenizers

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A byte-level tokenizer: ids 0 and 1 are the special tokens, every other id is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer.to_str()
