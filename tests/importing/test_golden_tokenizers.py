"""Tokenizers and chat templates of every family against transformers 5.24 and SentencePiece, recorded.

`python -m experiments.record_tokenizers` wrote the files. Of the two references SentencePiece counts where they
differ (29 strings of llama2, 44 of yi): transformers 5 puts no blank in front of a text that begins with one, and puts
one behind every user-defined symbol.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.importing import tokenizer as source

pytestmark = pytest.mark.tokenizers
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
FAMILIES = {"llama2": 480, "llama3": 485, "mistral": 482, "qwen2": 451, "yi": 480, "smollm2": 483}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    directory = GOLDEN / request.param
    text = source.from_directory(directory, FAMILIES[request.param])
    loaded = Tokenizer(text, source.chat_template(directory), special_tokens=source.special_tokens(directory))
    return loaded, json.loads((directory / "golden.json").read_text(encoding="utf-8"))


def test_strings(family):
    tokenizer, golden = family
    instead = {int(index): ids for index, ids in golden["sentencepiece_instead"].items()}
    assert len(golden["strings"]) == 200
    for index, (text, ids) in enumerate(golden["strings"]):
        assert tokenizer.encode(text, add_special_tokens=True) == instead.get(index, ids), text


def test_conversations(family):
    tokenizer, golden = family
    assert len(golden["conversations"]) == 20
    for turns, *ids in golden["conversations"]:
        assert tokenizer.chat([Message(turn["role"], turn["content"]) for turn in turns]) == ids[-1], turns
