"""Tokenizers as people have them: each case a small file and the ids that are right, worked out by hand."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.data.tokenizer_file import load_tokenizer
from dvi_jax.errors import UserError
from dvi_jax.importing import tokenizer as source

pytestmark = pytest.mark.tokenizers
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {text: index for index, text in enumerate([*SPECIAL, *BYTES, "he"])}  # 260 entries
H, E, I = VOCAB["h"], VOCAB["e"], VOCAB["i"]  # noqa: E741
HE, BLANK = VOCAB["he"], VOCAB["\u0120"]
KNOWS_IGNORE_MERGES = hasattr(models.BPE, "ignore_merges")


def added(index: int, content: str, special: bool = True, **flags: bool) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **plain, **flags}


def byte_level(tokens=None, merges=("h e",), vocab=None, **parts) -> dict:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"vocab": vocab or VOCAB, "merges": list(merges), **parts.pop("model", {})}
    document = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level}
    document |= {"added_tokens": [added(i, t) for i, t in enumerate(SPECIAL)] if tokens is None else tokens}
    return document | {"post_processor": None, "decoder": level, "model": model, **parts}


def around(bos: int, text: str) -> dict:
    first, body = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, body, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {text: {"id": text, "ids": [bos], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": [first, body], "pair": pair, "special_tokens": tokens}


@pytest.fixture
def build(tmp_path):
    """build({file: content}, vocab_size) -> the tokenizer of a directory with these files."""

    def make(files: dict, vocab_size: int = 400) -> Tokenizer:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text, encoding="utf-8")
        text = source.from_directory(tmp_path, vocab_size)
        return Tokenizer(text, source.chat_template(tmp_path), special_tokens=source.special_tokens(tmp_path))

    return make


def test_without_a_template_the_tokenizers_own_special_tokens_go_around(build):
    tokenizer = build({"tokenizer.json": byte_level(post_processor=around(1, "<s>"))})
    plain = tokenizer.encode("User: hi\nAssistant:")
    assert tokenizer.chat([Message("user", "hi")]) == [1, *plain]
    ids, mask = tokenizer.encode_conversation([Message("user", "hi"), Message("assistant", "he")])
    assert ids[0] == 1
    marked = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    assert tokenizer.decode(marked) == " he"


@pytest.mark.parametrize(
    ("settings", "processor", "ids"),
    [
        ({}, None, [HE]),
        ({"add_bos_token": True}, None, [1, HE]),
        ({"add_bos_token": True, "add_eos_token": True}, None, [1, HE, 2]),
        ({"add_bos_token": False}, around(1, "<s>"), [HE]),
        ({"add_eos_token": True}, None, [HE, 2]),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, [1, HE]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, None, [HE]),
        ({"tokenizer_class": "LlamaTokenizer"}, around(1, "<s>"), [1, HE]),
    ],
)
def test_what_goes_around_a_text(build, settings, processor, ids):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings}
    tokenizer = build({"tokenizer.json": byte_level(post_processor=processor), "tokenizer_config.json": config})
    assert tokenizer.encode("he", add_special_tokens=True) == ids


@pytest.mark.parametrize(
    ("model", "processor", "ids"),
    [
        ({"model_type": "llama"}, None, [1, HE]),
        ({"model_type": "mistral"}, None, [1, HE]),
        ({"model_type": "llama"}, around(2, "</s>"), [2, HE]),
        ({"model_type": "llama", "tokenizer_class": "PreTrainedTokenizerFast"}, None, [HE]),
        ({"model_type": "qwen2"}, None, [HE]),
    ],
)
def test_the_kind_of_model_says_what_a_tokenizer_without_a_class_is(build, model, processor, ids):
    files = {"config.json": model, "tokenizer.json": byte_level(post_processor=processor), "tokenizer_config.json": {}}
    tokenizer = build(files)
    assert tokenizer.encode("he", add_special_tokens=True) == ids
    assert tokenizer.encode("he<s>") == [HE, 1]


@pytest.mark.parametrize("listed", [[], [added(0, "<unk>")]])
@pytest.mark.parametrize(
    ("config", "text", "ids"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}, "he</s>", [HE, 2]),
        ({"tokenizer_class": "LlamaTokenizer"}, "<s>he</s>", [1, HE, 2]),
        ({"tokenizer_class": "GPT2Tokenizer"}, "he<|endoftext|>", [HE, 260]),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "he<|endoftext|>", [HE, 260]),
    ],
)
def test_special_tokens_are_matched_also_those_that_a_class_has_without_a_word(build, listed, config, text, ids):
    document = byte_level(listed, vocab={**VOCAB, "<|endoftext|>": 260})
    assert build({"tokenizer.json": document, "tokenizer_config.json": config}).encode(text) == ids


def test_a_class_has_no_special_token_that_its_vocabulary_lacks(build):
    config = {"tokenizer_class": "GPT2Tokenizer"}
    assert build({"tokenizer.json": byte_level(), "tokenizer_config.json": config}).vocab_size == 260


@pytest.mark.parametrize(("setting", "ids"), [({"add_prefix_space": True}, [BLANK, HE]), ({}, [HE])])
@pytest.mark.parametrize("in_file", [True, False])
def test_the_blank_in_front_of_a_gpt2_text(build, setting, ids, in_file):
    document = byte_level()
    document["pre_tokenizer"] = {**document["pre_tokenizer"], "add_prefix_space": in_file}
    config = {"tokenizer_class": "GPT2Tokenizer", **setting}
    assert build({"tokenizer.json": document, "tokenizer_config.json": config}).encode("he") == ids


def test_added_tokens_beside_tokenizer_json(build):
    files = {"tokenizer.json": byte_level(), "added_tokens.json": {"<|turn|>": 260, "<|done|>": 261}}
    tokenizer = build(files)
    ids = tokenizer.encode("<|turn|>hi<|done|>")
    assert ids == [260, H, I, 261]
    assert tokenizer.decode(ids) == "<|turn|>hi<|done|>"  # nothing calls them special
    with pytest.raises(UserError, match=r"added_tokens\.json: '<a>' and '<b>' have the same id 260"):
        build({**files, "added_tokens.json": {"<a>": 260, "<b>": 260}})


def test_flags_of_tokenizer_config_count(build):
    entries = {"260": added(260, "<|end|>", special=False), "2": added(2, "</s>", rstrip=True)}
    config = {"added_tokens_decoder": entries, "eos_token": "<|end|>", "additional_special_tokens": ["<|new|>"]}
    tokenizer = build({"tokenizer.json": byte_level(), "tokenizer_config.json": config})
    ids = tokenizer.encode("<|end|>h</s>  i<|new|>")
    assert ids == [260, H, 2, I, 261]
    assert tokenizer.decode(ids) == "hi"


def test_what_a_class_would_have_is_not_special_where_another_is_named(build):
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<s>"}
    config["added_tokens_decoder"] = {"2": added(2, "</s>", special=False)}
    tokenizer = build({"tokenizer.json": byte_level(), "tokenizer_config.json": config})
    assert tokenizer.decode([HE, 2]) == "he</s>"


def test_an_added_token_past_the_embedding_is_left_out(build, capsys):
    document = byte_level([*(added(i, t) for i, t in enumerate(SPECIAL)), added(260, "<pad>")])
    tokenizer = build({"tokenizer.json": document}, vocab_size=260)
    assert tokenizer.vocab_size == 260
    assert 260 not in tokenizer.encode("<pad>")
    note = capsys.readouterr().err
    assert note.startswith("note: ")
    assert "left out <pad> (260): the model's vocabulary is 260" in note
    with pytest.raises(UserError, match="token id 260, but the model's vocabulary is 260; they do not belong"):
        build({"tokenizer.json": {**document, "post_processor": around(260, "<pad>")}}, vocab_size=260)


def test_vocab_json_and_merges_txt(build, tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "GPT2Tokenizer"}
    files = {"vocab.json": VOCAB, "merges.txt": "#version: 0.2\nh e\n", "tokenizer_config.json": config}
    tokenizer, reference = build(files), tokenizers.Tokenizer.from_str(json.dumps(byte_level()))
    for text in ("he hehe", "<s>he</s>", "it's  12\n\n x", "é", ""):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert build({"merges.txt": "\ufeff#version: 0.2\r\nh e\r\n"}).encode("he") == [HE]  # as Windows writes it
    for change, message in (
        ({"merges.txt": "h e x\n"}, "'h e x' is not two tokens"),
        ({"merges.txt": "h e\nh i\n"}, "its merge 'h i' needs the token 'hi', which its vocabulary lacks"),
        ({"merges.txt": "#version: 0.2\nh e\n", "vocab.json": {"a": 1}}, "must number its tokens from 0"),
        ({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, "how a RobertaTokenizer cuts words"),
    ):
        with pytest.raises(UserError, match=message):
            build(change)


def test_a_tiktoken_vocabulary_is_called_that(build):
    with pytest.raises(UserError, match=r"tokenizer\.model is a tiktoken vocabulary"):
        build({"tokenizer.model": "IQ== 0\nIg== 1\n"})


@pytest.mark.parametrize("named", [{"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
                                   {"config.json": {"model_type": "qwen2"}}])  # fmt: skip
def test_qwen2_cuts_words_like_its_original(build, named):
    tokenizer = build({"vocab.json": VOCAB, "merges.txt": "h e\n", **named})
    cut = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("It'S 123 ok!\n\n x")
    assert [piece for piece, _ in cut] == ["It", "'S", "Ġ", "1", "2", "3", "Ġok", "!ĊĊ", "Ġx"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"eos_token": "</s>", "bos_token": None}}, {"bos_token": "", "eos_token": "</s>"}),
        ({"tokenizer_config.json": {"eos_token": {"content": "x"}}}, {"eos_token": "x"}),
        ({"special_tokens_map.json": {"bos_token": "b"}, "tokenizer_config.json": {}}, {"bos_token": "b"}),
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}},
         {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}, "tokenizer_config.json": {"eos_token": "</s>"}},
         {"eos_token": "<|im_end|>"}),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"},
          "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {"2": added(2, "</s>")}}},
         {"eos_token": "</s>"}),
        ({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}},
         {"bos_token": "", "eos_token": "</s>"}),
        ({}, {}),
    ],
)  # fmt: skip
def test_special_tokens_by_name(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert source.special_tokens(tmp_path) == expected


def test_templates_see_the_tokens_of_tokenizer_config():
    text = json.dumps(byte_level())
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    given = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(text, template, bos_token_id=1, eos_token_ids=(2, 4), special_tokens=given)
    assert tokenizer.render([Message("user", "x")]) == "<s>|<|im_end|>|<pad>"


@pytest.mark.parametrize("form", [list, dict])
def test_named_templates(tmp_path, form):
    path = tmp_path / "tokenizer_config.json"

    def write(**templates: str) -> None:
        entries = [{"name": name, "template": text} for name, text in templates.items()]
        path.write_text(json.dumps({"chat_template": entries if form is list else templates}))

    write(tool_use="t", default="d")
    assert source.chat_template(tmp_path) == "d"
    write(chat="c", tool_use="t")
    with pytest.raises(UserError, match="its chat templates are named chat, tool_use, and none of them default"):
        source.chat_template(tmp_path)


def test_templates_in_files_of_their_own(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("r")
    with pytest.raises(UserError, match="its chat templates are named rag, and none of them default; write the one"):
        source.chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("d")
    assert source.chat_template(tmp_path) == "d"


def metaspace(**settings) -> dict:
    vocab = {"<s>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4, "\u2581b": 5, "a\u2581b": 6, "\u2581\u2581": 7}
    merges = ["a \u2581b", "\u2581 a", "\u2581 b", "\u2581 \u2581"]
    pre = {"type": "Metaspace", "replacement": "\u2581", **settings}
    return byte_level([added(0, "<s>")], merges, vocab, pre_tokenizer=pre, decoder=None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"add_prefix_space": True}, {"a b": [4, 5], "a<s>b": [4, 0, 5], "  a": [1, 4], " a": [4], "<s>a": [0, 4]}),
        ({"add_prefix_space": False}, {"a b": [2, 5], "a<s>b": [2, 0, 3], "  a": [1, 4], "<s>a": [0, 2]}),
        ({"prepend_scheme": "always", "split": True}, {"a b": [4, 5], "a<s>b": [4, 0, 5]}),
        ({"prepend_scheme": "first", "split": True}, {"a b": [4, 5], "a<s>b": [4, 0, 3], "<s>a": [0, 2]}),
        ({"prepend_scheme": "first", "split": False},
         {"a b": [4, 5], "a<s>a b": [4, 0, 6], "<s>a": [0, 2], " a": [4], "": [], " <s>a": [1, 0, 2], "  ": [7]}),
        ({"prepend_scheme": "always", "split": False}, {"a<s>b": [4, 0, 5], "  a": [1, 4], " ": [1]}),
        ({"prepend_scheme": "never", "split": False, "add_prefix_space": False}, {"a<s>b": [2, 0, 3], "  ": [7]}),
    ],
)  # fmt: skip
def test_every_spelling_of_metaspace(settings, expected):
    tokenizer = Tokenizer(json.dumps(metaspace(**settings)))
    assert {text: tokenizer.encode(text) for text in expected} == expected


def test_without_a_cut_merges_cross_blanks():
    document = metaspace(prepend_scheme="never", split=False)
    document["model"]["merges"] = ["\u2581 b", "a \u2581b"]
    assert Tokenizer(json.dumps(document)).encode("a b") == [6]


def test_words_that_no_merge_leads_to():
    vocab = {**VOCAB, "hello": 260}
    text = json.dumps(byte_level(vocab=vocab, model={"ignore_merges": True}))
    if KNOWS_IGNORE_MERGES:
        assert Tokenizer(text).encode("hello") == [260]
    else:
        with pytest.raises(
            UserError, match=r"tokenizers 0\.\d+\.\d+ does not know ignore_merges=True .* newer tokenizers"
        ):
            load_tokenizer(text)
    reached = json.dumps(byte_level(model={"ignore_merges": True}))  # where merges give every word it changes nothing
    assert Tokenizer(reached).encode("hehi") == [HE, H, I]


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_settings_that_the_library_skips_are_refused(part):
    document = byte_level()
    document[part] = {**document[part], "some_new_rule": "on"}
    with pytest.raises(UserError, match="does not know some_new_rule='on' of 'ByteLevel'"):
        load_tokenizer(json.dumps(document))


def test_a_plain_added_token_in_the_vocabulary_is_matched_whole():
    """Releases before 0.14 matched only special ones there."""
    document = byte_level([added(260, "<tag>", special=False)], vocab={**VOCAB, "<tag>": 260})
    tokenizer = Tokenizer(json.dumps(document))
    assert tokenizer.encode("he<tag>h") == [HE, 260, H]
    assert tokenizer.decode([HE, 260, H]) == "he<tag>h"
    assert tokenizer.is_shown(260)
