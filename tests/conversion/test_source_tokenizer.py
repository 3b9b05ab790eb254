"""Tokenizers: built from GGUF metadata or SentencePiece, compared with the libraries that define them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from conversion.importing import open_source
from dvi_jax.errors import UserError
from dvi_jax.importing import tokenizer
from dvi_jax.importing.sentencepiece_file import parse_sentencepiece

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  Leading spaces and\ttabs\nand new lines\n\n  are kept.",
    "It's 2024; we've 3 apples, you'll see: naïve café — 東京 🙂",
] * 20
TEXTS = [*CORPUS[:3], "", " ", "a", "12 345", "unknown ☃ sign", "<|im_start|>user\nhi<|im_end|>", "x  y   z"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained_bpe(pre):
    """A byte-level BPE made by the tokenizers library, and the same one as GGUF metadata."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(CORPUS, trainer)
    merges = json.loads(reference.to_str())["model"]["merges"]
    ids = reference.get_vocab()
    tokens = sorted(ids, key=ids.get)
    return reference, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if token in SPECIAL else 1 for token in tokens], np.int32),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


@pytest.mark.parametrize(("name", "pre"), [("smollm", SMOLLM), ("gpt-2", BYTES)])
def test_byte_level_bpe_from_gguf_equals_the_original(name, pre):
    reference, metadata = trained_bpe(pre)
    built = tokenizers.Tokenizer.from_str(tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": name}, 400, "test"))
    for text in TEXTS:
        ids = built.encode(text).ids
        assert ids == reference.encode(text).ids
        assert built.decode(ids, skip_special_tokens=False) == text
    assert built.encode("<|im_start|>").ids == [1]


def test_llama3_splitting_and_bos():
    _, metadata = trained_bpe(BYTES)
    metadata |= {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
    built = tokenizers.Tokenizer.from_str(tokenizer.from_gguf(metadata, 400, "test"))
    words = [text for text, _ in built.pre_tokenizer.pre_tokenize_str("It'S 12345 ok!\n\n x")]
    assert words == ["It", "'S", "Ġ", "123", "45", "Ġok", "!ĊĊ", "Ġx"]
    assert built.encode("fox").ids[0] == 1
    assert built.encode("fox", add_special_tokens=False).ids == built.encode("fox").ids[1:]


@pytest.fixture(scope="module")
def sentencepiece_model():
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=output,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return output.getvalue()


@pytest.fixture
def sentencepiece_directory(make_hf, sentencepiece_model):
    directory = make_hf(vocab_size=500)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    return directory


def test_sentencepiece_equals_both_libraries(sentencepiece_directory, sentencepiece_model):
    from transformers import LlamaTokenizerFast

    built = tokenizers.Tokenizer.from_str(open_source(sentencepiece_directory).tokenizer_json)
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    converted = LlamaTokenizerFast(vocab_file=str(sentencepiece_directory / "tokenizer.model"))
    for text in TEXTS:
        ids = built.encode(text, add_special_tokens=False).ids
        assert built.encode(text).ids == [reference.bos_id(), *ids]
        assert built.encode(text).ids == converted(text).input_ids
        if text:
            assert ids == reference.encode(text)
            assert built.decode(ids) == text


def test_sentencepiece_inside_gguf_metadata(sentencepiece_directory, sentencepiece_model):
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    size = reference.vocab_size()

    def kind(index):
        checks = [(reference.is_unknown, 2), (reference.is_control, 3), (reference.is_byte, 6)]
        return next((number for check, number in checks if check(index)), 1)

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": np.array([reference.get_score(index) for index in range(size)], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(index) for index in range(size)], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
    }
    text = tokenizer.from_gguf(metadata, size, "test")
    assert json.loads(text) == json.loads(open_source(sentencepiece_directory).tokenizer_json)


def test_tokens_kept_beside_tokenizer_model(sentencepiece_directory, sentencepiece_model):
    size = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model).vocab_size()
    (sentencepiece_directory / "added_tokens.json").write_text(json.dumps({"<pad>": size, "<|end|>": size + 1}))
    built = tokenizers.Tokenizer.from_str(open_source(sentencepiece_directory).tokenizer_json)
    assert built.encode("<pad><|end|>", add_special_tokens=False).ids == [size, size + 1]
    (sentencepiece_directory / "added_tokens.json").write_text(json.dumps({"<pad>": size + 7}))
    with pytest.raises(UserError, match="'<pad>' cannot have id"):
        open_source(sentencepiece_directory)


@pytest.mark.parametrize("entries", [[1], {"\u0663": {"content": "x"}}, {"9" * 5000: {"content": "x"}}, {"500": "x"}])
def test_malformed_added_tokens(sentencepiece_directory, entries):
    (sentencepiece_directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(UserError, match="added_tokens_decoder"):
        open_source(sentencepiece_directory)


def test_vocabularies_whose_merges_would_never_end():
    """Every cut of every piece is looked up: quadratic in the length of a piece."""

    def build(tokens):
        size = len(tokens)
        return tokenizer.from_gguf(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.scores": np.zeros(size, np.float32),
                "tokenizer.ggml.token_type": np.ones(size, np.int32),
                "tokenizer.ggml.add_bos_token": False,
            },
            size,
            "test",
        )

    assert json.loads(build(["a", "aa", "a" * 256]))["model"]["merges"] == ["a a"]
    with pytest.raises(UserError, match="absurdly long or many pieces, such as 'aaa"):
        build(["a", "a" * 257])
    with pytest.raises(UserError, match="a vocabulary of more than 4194304 characters is absurd"):
        build(["a" * (1 << 22), "b"])


def test_newer_merge_pairs_become_strings(make_hf):
    reference, _ = trained_bpe(SMOLLM)
    document = json.loads(reference.to_str())
    strings = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    document["model"]["merges"] = [merge.split(" ") for merge in strings]
    directory = make_hf(vocab_size=400)
    (directory / "tokenizer.json").write_text(json.dumps(document))
    text = open_source(directory).tokenizer_json
    assert json.loads(text)["model"]["merges"] == strings
    assert tokenizers.Tokenizer.from_str(text).encode(CORPUS[2]).ids == reference.encode(CORPUS[2]).ids


def test_tokenizer_json_is_kept_to_the_byte(make_hf):
    reference, _ = trained_bpe(SMOLLM)
    document = json.loads(reference.to_str())
    document["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    directory = make_hf(vocab_size=400)
    original = json.dumps(document, indent=3)
    (directory / "tokenizer.json").write_text(original)
    assert open_source(directory).tokenizer_json == original


def test_vocabulary_larger_than_the_embedding(make_hf):
    reference, metadata = trained_bpe(SMOLLM)
    size = reference.get_vocab_size()
    directory = make_hf(vocab_size=size - 1)
    (directory / "tokenizer.json").write_text(reference.to_str())
    message = f"token id {size - 1}, but the model's vocabulary is {size - 1}; they do not belong together"
    with pytest.raises(UserError, match=message):
        open_source(directory)
    with pytest.raises(UserError, match=message):
        tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "smollm"}, size - 1, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "deepseek-coder"}, "pre-tokenizer 'deepseek-coder' is not known"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert' is not known"),
        (
            {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": np.array([1, 1])},
            "holds 'a' twice",
        ),
        ({"tokenizer.ggml.token_type": np.array([1])}, "tokens but 1 token types"),
        ({"tokenizer.ggml.token_type": None}, "tokenizer.ggml.token_type is missing"),
        (
            {"tokenizer.ggml.tokens": np.array([1])},
            "tokenizer.ggml.tokens is missing or not a list of strings",
        ),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "cannot be loaded"),
        ({"tokenizer.ggml.model": np.array([1, 2])}, "tokenizer model 'array([1, 2])' is not known"),
        ({"tokenizer.ggml.pre": np.array([1, 2])}, "'array([1, 2])' is not known"),
        ({"tokenizer.ggml.add_bos_token": np.array([1, 2])}, "add_bos_token must be true or false"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 400},
            "id 400 is not in the vocabulary",
        ),
    ],
)
def test_gguf_tokenizers_that_are_refused(changes, message):
    _, metadata = trained_bpe(SMOLLM)
    with pytest.raises(UserError) as caught:
        tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "smollm"} | changes, 500, "test")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}', "[]"])
def test_malformed_tokenizer_json(make_hf, content):
    directory = make_hf()
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        open_source(directory)


@pytest.mark.parametrize("content", [b"", b"\xff\xff not a model", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x08\x01"])
def test_malformed_sentencepiece(make_hf, content):
    directory = make_hf()
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        open_source(directory)


def test_truncated_sentencepiece_never_escapes_as_another_error(sentencepiece_model):
    whole = parse_sentencepiece(sentencepiece_model, "test")
    refused = 0
    for cut in range(0, len(sentencepiece_model), 7):
        try:
            assert len(parse_sentencepiece(sentencepiece_model[:cut], "test").pieces) <= len(whole.pieces)
        except UserError:
            refused += 1
    assert refused > 100


def test_unigram_models_are_refused(make_hf):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=output,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    directory = make_hf(vocab_size=500)
    (directory / "tokenizer.model").write_bytes(output.getvalue())
    with pytest.raises(UserError, match="is not a BPE model"):
        open_source(directory)


def test_where_the_chat_template_comes_from(make_hf):
    directory = make_hf()
    assert open_source(directory).chat_template is None
    config = directory / "tokenizer_config.json"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert open_source(directory).chat_template == "d"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert open_source(directory).chat_template == "one"
    config.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(UserError, match="the chat template must be a string"):
        open_source(directory)
    config.write_text(json.dumps({"chat_template": [{"name": [], "template": "x"}, {"name": "tool"}, 3]}))
    assert open_source(directory).chat_template is None
    config.write_text('{"chat_template": "half a pair: \\ud83d"}')
    with pytest.raises(UserError, match="the chat template must be a string"):
        open_source(directory)
    (directory / "chat_template.jinja").write_text("file")
    assert open_source(directory).chat_template == "file"
