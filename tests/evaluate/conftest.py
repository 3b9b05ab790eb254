"""A tiny random checkpoint that speaks bytes, and turns made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tokenizers
from tokenizers import decoders as token_decoders
from tokenizers import models, pre_tokenizers

from dvi_jax.checkpoint import Manifest, write_checkpoint
from dvi_jax.evaluate.trace import PLAIN, SPECULATIVE, Trace, Turn
from dvi_jax.load import LoadedModel, enable_compilation_cache, load
from dvi_jax.model.llama import random_base
from dvi_jax.presets import TINY

SPECIAL_TOKENS = ["<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CONTEXT = 160
# First turns are alike in length, so that they share one compiled program.
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a long word.", "Another."]},
    {"question_id": 2, "category": "coding", "turns": ["def function(x):"], "reference": ["ignored"]},
    {"question_id": "three", "category": "qa", "turns": ["Where is the moon?"]},
    {"question_id": 4, "category": "qa", "turns": ["x" * CONTEXT]},
    {"question_id": 5, "category": "writing", "turns": ["Write a short word.", "y" * CONTEXT, "never asked"]},
]


def byte_tokenizer() -> str:
    """Ids 0 and 1 are the special tokens, every other id is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer.to_str()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory) -> Iterator[None]:
    """Compiled programs are kept as the command line keeps them, but not in the home directory of who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVI_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        enable_compilation_cache()
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model whose drafter is right about half of the time."""
    config = replace(
        TINY, vocab_size=258, max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_ids=(1,)
    )
    path = tmp_path_factory.mktemp("evaluate") / "tiny"
    base = random_base(config, jax.random.key(3), std=0.15)
    manifest = Manifest("random", "0" * 64, "float32", 1)
    write_checkpoint(path, config, manifest, base, tokenizer_json=byte_tokenizer(), chat_template=CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def model(checkpoint) -> LoadedModel:
    return load(checkpoint)


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def make_turn() -> Callable[..., Turn]:
    """Turns from (drafted, accept_length) pairs; seconds are of the plain and of the speculative run."""

    def make(
        rounds: Sequence[tuple[int, int]],
        *,
        question_id: int | str = 1,
        category: str = "qa",
        turn: int = 0,
        seconds: tuple[float, float] = (1.0, 1.0),
        prefill: float = 0.5,
        plain_ids: list[int] | None = None,
    ) -> Turn:
        ids = list(range(1 + sum(length for _, length in rounds)))
        plain_ids = ids if plain_ids is None else plain_ids
        same = (question_id, category, turn)
        tail = ("length", prefill)
        ones = [1] * (len(plain_ids) - 1)
        return Turn(
            Trace(*same, PLAIN, True, 7, 32, [0] * len(ones), ones, plain_ids, *tail, seconds[0]),
            Trace(
                *same, SPECULATIVE, False, 7, 32, [d for d, _ in rounds], [a for _, a in rounds], ids, *tail, seconds[1]
            ),
        )

    return make
