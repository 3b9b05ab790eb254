"""Prompts made of a log: which conversation serves which purpose, and what the requests contain."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from dvi_jax.data.conversations import Conversation, Message, StreamPosition
from dvi_jax.data.prompts import is_held_out
from dvi_jax.errors import UserError
from dvi_jax.loading import load
from experiments.domains import chat_alone, language_of, purpose, sentences
from experiments.pack import main as pack_main
from experiments.prompts import FAMILIES, main

NUMBERS = range(1000)
LONGEST = 4000
# Every text of conversation 12 has the word "mark12x", which the tests look for in what comes out.
QUESTION = "How many apples are in {mark} boxes if there are 3 in each of them?"
PARAGRAPH = "It is {mark} on the way to the sea. "
GERMAN = "Das ist {mark} und die See ist auf dem Weg."


def conversation(number: int) -> dict:
    mark = f"mark{number}x"
    kind = ("", "Write a python function. ")[number % 2]
    answer = f"{PARAGRAPH * 12}\n\n{PARAGRAPH * 9}".format(mark=mark)
    answer = answer if number % 3 else answer + "\n\n" + GERMAN.format(mark=mark)
    turns = [
        ("human", kind + f"What is {mark}?"),
        ("gpt", answer),
        ("human", QUESTION.format(mark=mark)),
        ("gpt", answer),
    ]
    return {"id": f"c{number}", "conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.json"
    path.write_text(json.dumps([conversation(number) for number in NUMBERS]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(log, byte_checkpoint, tmp_path_factory):
    """The folder, and the marks in each of its files."""
    out = tmp_path_factory.mktemp("prompts")
    arguments = ["--checkpoint", str(byte_checkpoint), "--data", str(log), "--out", str(out)]
    sizes = ["--prompts", "300", "--max-prompt-tokens", str(LONGEST), "--per-domain", "40", "--first-turns", "100"]
    assert main([*arguments, *sizes]) == 0
    with np.load(out / "prompts.npz") as file:
        lengths, ids = file["lengths"], file["ids"]
    decode = load(byte_checkpoint).tokenizer.decode
    prompts = [decode(prompt.tolist()) for prompt in np.split(ids, np.cumsum(lengths)[:-1])]
    marks = {path.name: marks_in(path.read_text(encoding="utf-8")) for path in out.glob("*.jsonl")}
    return out, prompts, marks | {"prompts.npz": marks_in(" ".join(prompts))}


def marks_in(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"mark(\d+)x", text)}


def held_out_numbers() -> set[int]:
    questions = {n: conversation(n)["conversations"][0]["value"] for n in NUMBERS}
    return {n for n, question in questions.items() if is_held_out(question, 0.02, "held-out")}


def test_every_conversation_serves_one_purpose(made):
    _, _, marks = made
    held_out = held_out_numbers()
    assert len(held_out) > 12
    assert marks["heldout.jsonl"] <= held_out
    assert not marks["prompts.npz"] & held_out
    domains = marks["chat.jsonl"] | marks["code.jsonl"] | marks["translation.jsonl"]
    assert len(marks["prompts.npz"]) > 100
    assert not marks["prompts.npz"] & domains


def test_every_family_has_its_share(made):
    out, prompts, _ = made
    assert len(prompts) == len(set(prompts)) == 300
    assert max(map(len, prompts)) <= LONGEST  # a token is a byte
    assert sum(prompt.startswith("User: ") and len(prompt) < 100 for prompt in prompts) >= 180
    ids = [json.loads(line)["id"] for line in (out / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {name.split("-")[0] for name in ids} == set(FAMILIES)
    assert len(set(ids)) == len(ids)


def test_a_stream_finds_what_it_trains_on_and_what_it_holds_out(made, byte_checkpoint):
    """As the online runs read the files: the held-out share of each by its own hash."""
    from dvi_jax.config import DataConfig
    from dvi_jax.data import ConversationStream, PromptStream

    out, _, _ = made
    tokenizer = load(byte_checkpoint).tokenizer
    for name, fraction, longest, train in (("conversations", 0.05, 192, 100), ("code", 0.02, 128, 40)):
        settings = DataConfig(max_prompt_tokens=longest, held_out_fraction=fraction)
        stream = PromptStream(ConversationStream(out / f"{name}.jsonl"), tokenizer, settings)
        assert sum(1 for _ in stream) == train
        assert len(stream.held_out_prompts(1000)) >= 5
        assert set(stream.counts) == {"held out"}


def test_domains(made):
    out, _, _ = made
    texts = {name: (out / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("chat", "code", "translation")}
    assert "python" in texts["code"]
    assert "python" not in texts["chat"]
    assert "Das ist" in texts["translation"]
    assert "English" in texts["translation"]
    assert re.search("Spanish|French|Polish|Hindi", texts["translation"])
    ids = [json.loads(line)["id"] for text in texts.values() for line in text.splitlines()]
    assert len(set(ids)) == len(ids) > 120  # one stream reads all three


def test_sentences_and_languages():
    text = 'No.\nIt is a long way to the sea from here. lower case is not the start of one.\n- "`code` in the middle".'
    assert sentences(text) == ["It is a long way to the sea from here."]
    assert language_of("It is a long way to the sea and to the house.") == "English"
    assert language_of("Das ist die Geschichte und sie ist nicht sehr lang.") == "German"
    assert language_of("Il est dans la maison avec les enfants pour une heure.") == "French"
    assert language_of("Table chairs sofa lamp curtains.") is None


@pytest.mark.full
def test_packed_text_leaves_out_the_held_out_share(log, byte_checkpoint, tmp_path):
    out = tmp_path / "new" / "text.npz"
    arguments = ["--checkpoint", str(byte_checkpoint), "--data", str(log), "--out", str(out), "--row-length", "1024"]
    assert pack_main(arguments) == 0
    with np.load(out) as file:
        tokens = file["tokens"]
    text = load(byte_checkpoint).tokenizer.decode(tokens.ravel().tolist())
    kept = set(NUMBERS) - held_out_numbers()
    assert len(kept ^ marks_in(text)) <= 1  # the last, incomplete row is left out


PROMPT = "Tell me in a few words what the weather was like on Tuesday last week"
CHAT = ("What is a good name for a small grey cat?", "Smoky is a good name for it, and so is Misty.")
OTHERS = {
    "a fence": (CHAT[0], "Like this: ``` cat = 1 ```"),
    "asked for code": ("Write a function that names a cat.", CHAT[1]),
    "asked for a program later": (*CHAT, "How would an algorithm choose one?", CHAT[1]),
    "code without a fence": (CHAT[0], "Call it so:\nname(cat);\nand then feed it."),
    "asked to translate": ("Please translate this for the owner of the cat.", CHAT[1]),
    "a language": ("What is the cat called in French?", CHAT[1]),
    "a foreign answer": (CHAT[0], "Das ist eine Katze und sie ist nicht sehr alt."),
    "another script": (CHAT[0], "\u5c0f\u732b\u7684\u540d\u5b57"),
    "a language without a list": (CHAT[0], "Kucing itu kecil serta abu abu dengan ekor panjang. " * 5),
    "a prompt of a stream": (PROMPT.upper(), CHAT[1]),
    "text of a prompt": (CHAT[0], "Well, " + PROMPT[8:-12] + "Monday."),
}


def spoken(texts: tuple[str, ...], name: str = "c") -> Conversation:
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
    return Conversation(name, messages, StreamPosition())


@pytest.mark.parametrize("kind", OTHERS)
def test_chat_alone_leaves_out(kind, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_text(json.dumps({"messages": [{"role": "user", "content": PROMPT}]}) + "\n", encoding="utf-8")
    kept = chat_alone([spoken(OTHERS[kind], "other"), spoken(CHAT, "chat")], [str(stream)])
    assert [conversation.id for conversation in kept] == ["chat"]


def test_chat_alone_has_no_conversation_that_a_stream_may_be_made_of():
    questions = [f"What is a good name for cat number {number}?" for number in range(200)]
    kept = {c.messages[0].content for c in chat_alone([spoken((q, CHAT[1])) for q in questions], [])}
    assert kept == {q for q in questions if purpose(q) == "replies"}
    assert 90 < len(kept) < 160


def test_packed_chat_shares_no_text_with_the_streams(log, made, byte_checkpoint, tmp_path):
    streams = [str(made[0] / f"{name}.jsonl") for name in ("chat", "code", "translation")]
    arguments = ["--checkpoint", str(byte_checkpoint), "--data", str(log), "--out", str(tmp_path / "chat.npz")]
    assert pack_main([*arguments, "--domain", "chat", "--unseen", *streams]) == 0
    with np.load(tmp_path / "chat.npz") as file:
        text = load(byte_checkpoint).tokenizer.decode(file["tokens"].ravel().tolist())
    kept, used = marks_in(text), set.union(*(made[2][f"{name}.jsonl"] for name in ("chat", "code", "translation")))
    assert len(kept) > 100
    assert not kept & used
    assert "python" not in text
    assert "Das ist" not in text
    with pytest.raises(UserError, match="--domain chat"):
        pack_main([*arguments, "--unseen", *streams])
