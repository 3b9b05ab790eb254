"""Prompts of many kinds made of conversation logs: to generate replies for, to choose settings with, to shift domains.

    python -m experiments.prompts --checkpoint CKPT --data FILE --out DIR

What real traffic asks for is wider than the short first questions that fill a log, so the log's own text is also put
into requests to sum up, to answer from passages and to translate (`FAMILIES`). A conversation serves one purpose only,
by the hash of its first question. Writes into DIR

    prompts.npz          prompts for experiments/self_generate.py (`lengths` int32 [N], `ids` end to end)
    heldout.jsonl        prompts of the held-out share, for experiments/sweep.py --all
    conversations.jsonl  first questions, for experiments/objectives.py
    chat.jsonl, code.jsonl, translation.jsonl   short prompts of one domain, for experiments/domain_shift.py

Records have ids such as `summary-12`: the family and a number, or in a domain's file the domain and a number, since the
three files are read as one stream, which skips an id it has seen.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi_jax.data.conversations import Conversation, ConversationStream, Message
from dvi_jax.data.prompts import HELD_OUT_SALT, context_of_turn, is_held_out
from dvi_jax.data.template import TemplateRefusedError
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.importing.cache import open_checkpoint
from experiments.domains import (
    CODE,
    HELD_OUT_FRACTION,
    INTO_LANGUAGES,
    domain_of,
    language_of,
    purpose,
    question_of,
    sentences,
)

OBJECTIVES_FRACTION = 0.05  # held_out_fraction of configs/objectives.yaml; its held-out share contains the one here
SHORT_TOKENS, OBJECTIVES_TOKENS = 128, 192  # longest prompt of the domain files and of conversations.jsonl

# Family -> share of prompts.npz, prompts in heldout.jsonl.
FAMILIES = {
    "first": (0.60, 64),
    "summary": (0.10, 16),
    "context": (0.10, 16),
    "translation": (0.08, 16),
    "reasoning": (0.04, 8),
    "turns": (0.08, 16),
}

SUMMARY_REQUESTS = (
    "Give me a short summary of the following text.\n\n{text}",
    "{text}\n\nWhat are the main points of this text? Answer in a few sentences.",
    "Sum up the passage below in two or three sentences:\n\n{text}",
    "TL;DR of this please:\n\n{text}",
    "Please condense this into one paragraph.\n\n{text}",
    'I have no time to read all of this. What does it say, briefly?\n\n"{text}"',
    "Write a brief overview of what follows.\n---\n{text}\n---",
    "Shorten the text below to its key ideas, as bullet points.\n\n{text}",
    "{text}\n\nIn short: what is this about?",
    "Read the following and write an abstract of at most 80 words:\n\n{text}",
)
CONTEXT_REQUESTS = (
    "Use the notes below to answer the question at the end.\n\n{passages}\n\n{question}",
    "{passages}\n\nBased on the text above: {question}",
    "Here are some passages I found:\n\n{passages}\n\nWith their help, tell me: {question}",
    "Context:\n{passages}\n\nUser question: {question}\nReply from the context where possible.",
    "I am looking for an answer to this: {question}\n\nThese are my sources.\n\n{passages}",
    "{question}\n\nBackground:\n{passages}",
)
INTO_REQUESTS = (
    "How do you say this in {language}? {sentence}",
    "Please translate into {language}: {sentence}",
    "{sentence}\n\nPut this into {language}.",
    'Write the following sentence in {language}: "{sentence}"',
    'What is the {language} translation of "{sentence}"?',
    "Can you give me this in {language}?\n{sentence}",
)
FROM_REQUESTS = (
    "What does this mean in English? {sentence}",
    "Please translate this {language} sentence into English: {sentence}",
    "English version, please: {sentence}",
    "{sentence}\n\nHow would that read in English?",
    "I got this message in {language}. What does it say in English?\n\n{sentence}",
)

REASONING = re.compile(
    r"\b(how (many|much|long|far|old)|calculate|compute|solve|probability|equation|percent|average|ratio|sum of|total"
    r"|prove|value of|per (hour|day|year|month))\b",
    re.I,
)
NOT_REASONING = re.compile(CODE.pattern + r"|\b(article|words?|write|outline|paragraph|excel|table|summary)\b", re.I)


@dataclass(frozen=True)
class Candidate:
    """A prompt that could be used: its family, and messages that end with a user's."""

    family: str
    messages: tuple[Message, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the log once, make every candidate, and write the files."""
    parser = ArgumentParser(prog="python -m experiments.prompts", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--prompts", type=int, default=12000, help="prompts in prompts.npz")
    parser.add_argument("--max-prompt-tokens", type=int, default=850)
    parser.add_argument("--per-domain", type=int, default=512, help="training prompts in each domain's file")
    parser.add_argument("--first-turns", type=int, default=2200, help="training prompts in conversations.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(options.checkpoint))
    parts = by_purpose(ConversationStream(options.data), np.random.default_rng(options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    longest = options.max_prompt_tokens
    held_out = list(choose(parts["held out"], tokenizer, longest, {f: n for f, (_, n) in FAMILIES.items()}))
    write_records(options.out / "heldout.jsonl", [candidate for candidate, _ in held_out])
    wanted = {family: round(share * options.prompts) for family, (share, _) in FAMILIES.items()}
    seen = {tuple(ids) for _, ids in held_out}
    write_prompts(options.out / "prompts.npz", choose(parts["replies"], tokenizer, longest, wanted, seen))
    every = [candidate for found in parts.values() for candidate in found]
    write_conversations(options.out / "conversations.jsonl", every, tokenizer, options.first_turns)
    write_domains(options.out, parts["held out"] + parts["domains"], tokenizer, options.per_domain)
    return 0


def by_purpose(stream: Iterable[Conversation], rng: np.random.Generator) -> dict[str, list[Candidate]]:
    """All candidates, shuffled: of conversations `held out`, for `domains`, and for `replies`."""
    parts: dict[str, list[Candidate]] = {"held out": [], "domains": [], "replies": []}
    for conversation in stream:
        parts[purpose(question_of(conversation))] += candidates(conversation, rng)
    return {name: [found[i] for i in rng.permutation(len(found))] for name, found in parts.items()}


def candidates(conversation: Conversation, rng: np.random.Generator) -> Iterator[Candidate]:
    """Every prompt that is made of one conversation, at most three of a family."""
    question = question_of(conversation)
    answers = [m.content for m in conversation.messages if m.role == "assistant"]
    if is_readable(question):
        yield Candidate("first", (Message("user", question),))
    made = {
        "summary": summary_request([*answers, question], rng),
        "context": context_request(conversation.messages, rng),
        "translation": translation_request([question, *answers], rng),
    }
    requests = [(family, text) for family, text in made.items() if text is not None]
    for family, text in [*requests, *(("reasoning", text) for text in reasoning_questions(conversation.messages))]:
        yield Candidate(family, (Message("user", text),))
    turns = sum(m.role == "user" for m in conversation.messages)
    if turns > 1:
        context = context_of_turn(conversation.messages, int(rng.integers(1, min(turns, 3))))
        if all(is_readable(message.content) for message in context):
            yield Candidate("turns", tuple(context))


def is_readable(text: str) -> bool:
    """Neither empty nor encoded data (a very long word)."""
    return bool(text.strip()) and max(map(len, text.split())) <= 80


def pick(items: list[str] | tuple[str, ...], rng: np.random.Generator) -> str:
    """One of them."""
    return items[int(rng.integers(len(items)))]


def summary_request(texts: list[str], rng: np.random.Generator) -> str | None:
    """A request to sum up one text, or a few one after the other until they are long, cut at a sentence's end."""
    usable = [text for text in texts if is_readable(text) and "```" not in text]
    if not usable:
        return None
    most, start = int(rng.integers(700, 3600)), int(rng.integers(len(usable)))
    text = usable[start]
    for following in usable[start + 1 :]:
        if len(text) > 0.7 * most:
            break
        text = f"{text}\n\n{following}"
    if len(text) > most:
        text = text[: max(text.rfind(". ", 0, most), text.rfind(".\n", 0, most)) + 1]
    return pick(SUMMARY_REQUESTS, rng).format(text=text.strip()) if len(text) > 500 else None


def context_request(messages: tuple[Message, ...], rng: np.random.Generator) -> str | None:
    """Passages of the answers, one to the question among them where there is one, and a question of the user."""
    asked: list[tuple[str, list[str]]] = []  # question, passages of the answer to it
    others: list[str] = []
    for before, after in itertools.pairwise(messages):
        if after.role != "assistant":
            continue
        passages = [p.strip() for p in after.content.split("\n\n") if 150 < len(p) < 1200 and "```" not in p]
        passages = [p for p in passages if is_readable(p)]
        questions = [s for s in sentences(before.content) if s.endswith("?") and len(s) > 20]
        if before.role == "user" and questions and passages:
            asked.append((questions[-1], passages))
        others += passages
    if not asked:
        return None
    question, own = asked[int(rng.integers(len(asked)))]
    chosen = own[: int(rng.integers(1, 4))]
    others = [passage for passage in others if passage not in own]
    chosen += [others[i] for i in rng.permutation(len(others))[: rng.integers(0, 5)]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    if rng.random() < 0.4:
        chosen = [f"[{number}] {passage}" for number, passage in enumerate(chosen, 1)]
    return pick(CONTEXT_REQUESTS, rng).format(passages="\n\n".join(chosen), question=question)


def translation_request(texts: list[str], rng: np.random.Generator) -> str | None:
    """A sentence in another language into English where there is one, else an English one into another language."""
    found = [(sentence, language_of(sentence)) for text in texts for sentence in sentences(text)[:40]]
    foreign = [(sentence, language) for sentence, language in found if language not in (None, "English")]
    if foreign:
        sentence, language = foreign[int(rng.integers(len(foreign)))]
        return pick(FROM_REQUESTS, rng).format(sentence=sentence, language=language)
    english = [sentence for sentence, language in found if language == "English"]
    if not english:
        return None
    return pick(INTO_REQUESTS, rng).format(sentence=pick(english, rng), language=pick(INTO_LANGUAGES, rng))


def reasoning_questions(messages: tuple[Message, ...]) -> list[str]:
    """Messages of a user that ask for a calculation or a proof, each usable alone."""
    texts = [m.content for m in messages if m.role == "user" and 40 < len(m.content) < 900 and is_readable(m.content)]
    return [t for t in texts if REASONING.search(t) and re.search(r"\d", t) and not NOT_REASONING.search(t)][:3]


def choose(
    found: Iterable[Candidate],
    tokenizer: Tokenizer,
    longest: int,
    wanted: dict[str, int],
    seen: set[tuple[int, ...]] | None = None,
) -> Iterator[tuple[Candidate, list[int]]]:
    """The first `wanted[family]` candidates with at most `longest` tokens; each prompt once, none of `seen`."""
    left, seen = dict(wanted), set(seen or ())
    for candidate in found if any(left.values()) else ():
        fits = sum(len(message.content) for message in candidate.messages) < 8 * longest  # spares the tokenizer
        if not left.get(candidate.family) or not fits:
            continue
        try:
            ids = tokenizer.chat(candidate.messages)
        except TemplateRefusedError:
            continue
        if len(ids) <= longest and tuple(ids) not in seen:
            seen.add(tuple(ids))
            left[candidate.family] -= 1
            yield candidate, ids
            if not any(left.values()):  # who makes candidates as they are asked for makes no more
                return


def write_prompts(path: Path, chosen: Iterable[tuple[Candidate, list[int]]]) -> None:
    """Token ids of every prompt, for experiments/self_generate.py."""
    families, prompts = [], []
    for candidate, ids in chosen:
        families.append(candidate.family)
        prompts.append(ids)
    if not prompts:
        raise UserError("the data give no prompt to generate replies for")
    lengths, joined = np.array([len(p) for p in prompts], np.int32), np.concatenate(prompts)
    np.savez_compressed(path, lengths=lengths, ids=joined.astype(np.uint16 if joined.max() < 2**16 else np.int32))
    print(f"{path}: {len(prompts)} prompts, {len(joined)} tokens, {dict(Counter(families))}")


def write_records(path: Path, found: Iterable[Candidate], kind: str | None = None) -> None:
    """One conversation a line, ids by `kind` (default: the family) and number."""
    numbers: Counter[str] = Counter()
    lines = []
    for candidate in found:
        name = kind or candidate.family
        messages = [{"role": message.role, "content": message.content} for message in candidate.messages]
        lines.append(json.dumps({"id": f"{name}-{numbers[name]}", "messages": messages}))
        numbers[name] += 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {dict(numbers)}")


def write_conversations(path: Path, found: list[Candidate], tokenizer: Tokenizer, train: int) -> None:
    """First questions: `train` to learn from, and as many held-out ones as an evaluation could want."""
    first = [candidate for candidate in found if candidate.family == "first"]
    write_records(path, sides(first, tokenizer, OBJECTIVES_TOKENS, OBJECTIVES_FRACTION, (train, 128)))


def write_domains(out: Path, found: list[Candidate], tokenizer: Tokenizer, train: int) -> None:
    """One file for each domain: `train` prompts to learn from and some held-out ones."""
    domains: dict[str, list[Candidate]] = {"chat": [], "code": [], "translation": []}
    for candidate in found:
        if candidate.family == "translation":
            domains["translation"].append(candidate)
        elif candidate.family == "first" and (domain := domain_of(candidate.messages[-1].content)):
            domains[domain].append(candidate)
    for domain, inside in domains.items():
        chosen = sides(inside, tokenizer, SHORT_TOKENS, HELD_OUT_FRACTION, (train, 32))
        write_records(out / f"{domain}.jsonl", chosen, domain)


def sides(
    found: list[Candidate], tokenizer: Tokenizer, longest: int, fraction: float, wanted: tuple[int, int]
) -> list[Candidate]:
    """Of those that fit, as a `PromptStream` sees them: up to `wanted[1]` held-out ones, `wanted[0]` others."""
    everything = Counter(candidate.family for candidate in found)
    fitting = [candidate for candidate, _ in choose(found, tokenizer, longest, everything)]
    apart = [is_held_out(candidate.messages[-1].content, fraction, HELD_OUT_SALT) for candidate in fitting]
    held_out = [candidate for candidate, is_apart in zip(fitting, apart, strict=True) if is_apart]
    others = [candidate for candidate, is_apart in zip(fitting, apart, strict=True) if not is_apart]
    if len(others) < wanted[0]:
        raise UserError(f"the data give {len(others)} such prompts, {wanted[0]} were asked for")
    return held_out[: wanted[1]] + others[: wanted[0]]


if __name__ == "__main__":
    sys.exit(run_cli(main))
