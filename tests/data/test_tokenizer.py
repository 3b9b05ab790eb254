"""Text round trips, the chat template's text is what gets tokenised, answers are marked, damaged files are refused."""

from __future__ import annotations

import json
import types

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dvi_jax.data.conversations import Message
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import LONG_TEXT, Tokenizer
from dvi_jax.errors import UserError

pytestmark = pytest.mark.tokenizers
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    Message("user", "Hi"),
    Message("assistant", "\u00e9\U0001f600!"),
    Message("user", "So?"),
    Message("assistant", "Ok"),
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json) -> Tokenizer:
    return Tokenizer(tokenizer_json, CHATML, bos_token_id=0, eos_token_ids=(1,))


@given(text=st.text(max_size=50))
@example(text="a<|im_start|>b")
def test_round_trip(tokenizer, text):
    """Of any text; what looks like a special token is one."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(0) == text.count("<|im_start|>")


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 258
    assert tokenizer.token_id("<|im_end|>") == 1
    assert tokenizer.token_id("no such token") is None


def test_special_tokens_in_decoding(tokenizer):
    ids = [0, *tokenizer.encode("Hi"), 1]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>Hi<|im_end|>"
    assert tokenizer.decode([*ids, 258, 10**12, -1]) == "Hi"  # ids without a token are left out


def test_chat_is_the_tokens_of_the_rendered_text(tokenizer):
    ids = tokenizer.chat(CHAT[:1], system="Short.")
    text = "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [i for i in ids if i < 2] == [0, 1, 0, 1, 0]


def test_the_system_message_of_a_conversation_stays(tokenizer):
    own = [Message("system", "Mine."), *CHAT[:1]]
    assert tokenizer.chat(own, system="Other.") == tokenizer.chat(own)


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_mask_covers_the_answers(tokenizer_json, template):
    tokenizer = Tokenizer(tokenizer_json, template)
    ids, mask = tokenizer.encode_conversation(CHAT)
    assert ids == tokenizer.chat(CHAT, add_generation_prompt=False)
    end = "<|im_end|>" if template else ""
    blank = "" if template else " "
    marked = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    expected = f"{blank}\u00e9\U0001f600!{end}{blank}Ok{end}"
    assert tokenizer.decode(marked, skip_special_tokens=False) == expected


def test_a_template_that_rewrites_history_cannot_be_marked(tokenizer_json):
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateRefusedError, match="does not render turn by turn"):
        Tokenizer(tokenizer_json, source).encode_conversation(CHAT)


def test_without_a_template(tokenizer_json):
    tokenizer = Tokenizer(tokenizer_json)
    assert tokenizer.render([Message("system", "S"), *CHAT[:1]]) == "System: S\nUser: Hi\nAssistant:"


def test_truncation_and_padding_in_the_file_are_switched_off(tokenizer_json):
    description = json.loads(tokenizer_json)
    description["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    assert len(Tokenizer(json.dumps(description)).encode("hello")) == 5


def test_lone_surrogates_are_refused(tokenizer):
    """Python's name for bytes on a command line that are no text, a stop string's say, looked up as a token."""
    for look in (tokenizer.encode, tokenizer.token_id):
        with pytest.raises(UserError, match="lone surrogates"):
            look("\ud83d")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"type": "Magic"}}', "[" * 100_000])
def test_damaged_files_are_user_errors(text):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer(text)


def edited(tokenizer_json: str, **parts) -> str:
    return json.dumps({**json.loads(tokenizer_json), **parts})


def replacing(*contents: str) -> dict:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]
    return {"type": "Sequence", "normalizers": steps}


def test_replacements_that_blow_a_text_up_are_refused(tokenizer_json):
    assert Tokenizer(edited(tokenizer_json, normalizer=replacing("aa", "aa", "aaaa"))).encode("a") != []
    for hostile in (replacing("a" * 17), replacing(*["aa"] * 60)):
        with pytest.raises(UserError, match="its normalizer would make texts more than 16 times longer"):
            Tokenizer(edited(tokenizer_json, normalizer=hostile))


def test_ids_put_around_a_text_count_as_the_tokenizers(tokenizer_json):
    """So that a model whose embedding has no such row is refused."""
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": [4000], "tokens": ["x"]}},
    }
    tokenizer = Tokenizer(edited(tokenizer_json, post_processor=around))
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 4000
    assert tokenizer.vocab_size == 4001


def test_panics_of_the_library_are_user_errors(tokenizer_json):
    model = json.loads(tokenizer_json)["model"]
    short = {**model, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "####"}
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be loaded"):
        Tokenizer(edited(tokenizer_json, model=short))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(edited(tokenizer_json, pre_tokenizer=split))
    for text in ("a" * 40 + "b", "a" * 40 + "b" * LONG_TEXT):
        with pytest.raises(UserError, match="the tokenizer cannot encode this text"):
            tokenizer.encode(text)


def test_special_token_ids_beyond_the_vocabulary_are_empty_text(tokenizer_json):
    tokenizer = Tokenizer(tokenizer_json, "[{{ bos_token }}{{ eos_token }}]", bos_token_id=10**12, eos_token_ids=(-1,))
    assert tokenizer.render(CHAT) == "[]"


def test_from_checkpoint(tokenizer_json):
    config = types.SimpleNamespace(bos_token_id=0, eos_token_ids=(1,))
    whole = types.SimpleNamespace(
        path="c", tokenizer_json=tokenizer_json, chat_template=CHATML, config=config, special_tokens=None
    )
    assert Tokenizer.from_checkpoint(whole).eos_token_ids == (1,)
    whole.tokenizer_json = None
    with pytest.raises(UserError, match=r"c has no tokenizer\.json"):
        Tokenizer.from_checkpoint(whole)


def test_a_long_text_has_the_ids_of_its_parts(tokenizer_json):
    """Long texts go through the library's other entrance; of a byte tokenizer the ids are the bytes."""
    tokenizer = Tokenizer(tokenizer_json)
    text = "caf\u00e9 \u2603 " * 4000
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text) == tokenizer.encode("caf\u00e9 \u2603 ") * 4000
    with pytest.raises(UserError, match="lone surrogates"):
        tokenizer.encode(text + "\ud800")
