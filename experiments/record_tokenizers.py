"""Golden tokenizers: tiny ones of every family, and the ids that transformers 5 and SentencePiece give with them.

    python -m experiments.record_tokenizers --out tests/golden/tokenizers

It needs transformers 5, tokenizers and sentencepiece in an environment of its own; what it writes is what
tests/importing/test_golden_tokenizers.py reads. Texts and training are fixed, so a second run writes the same files.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = (  # noqa: SIM905 - a list of words reads better as a text
    "the quick brown fox jumps over lazy dog and it's 2024 we've seen naïve café 東京 3.14159 def main(): return x+1"
    " Hello world again hello WORLD HelloWorld snake_case user assistant system one two three question answer"
).split()
ODD = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        " a",
        "a ",
        "  lead",
        "trail  ",
        "x  y   z",
        "line\nline\n\nline",
        "\r\n",
        "tab\there",
    ),
    *(
        "12 345 67890",
        "0.5e-10",
        "I'm you're IT'S",
        "🙂👍🏽",
        "e\u0301 \u00e9",
        "\ufb01 \u00bd \uff12",
        "\u00a0nbsp\u2003em",
        "한국어 ㄱ",
    ),
    *(
        "\u2581already\u2581",
        "\u200b\ufeff",
        "العربية עברית",
        "ไทย",
        "i\u0307 \u0130 \u017f",
        "\x00\x01\x7f",
        "http://a.b/c?d=e&f#g",
    ),
    *(
        "<",
        "<s",
        "</s",
        "<|",
        "[INST",
        "<0x41>",
        "<unk>",
        "    def f(x):\n        return x",
        "a\u0300\u0301b",
        "\u2026\u2014\u201c\u201d\u2019",
    ),
)
STRFTIME = datetime.datetime(2024, 7, 26)

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '')"
    " + m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{% if documents is defined and documents is none %}"
    "{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{- '<|eot_id|>' }}{% for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TOJSON = (
    "{% for m in messages %}<|im_start|>{{ m | tojson(separators=(',', ':'), sort_keys=True, ensure_ascii=True) }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How one tokenizer is made; `special` are the texts that its strings mix in."""

    make: Callable[[Path], None]
    settings: dict[str, Any]
    special: tuple[str, ...]
    has_model: bool = field(default=False)


def corpus() -> list[str]:
    """What every tokenizer is trained on."""
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)] + list(ODD[:20]) * 2


def strings(special: tuple[str, ...]) -> list[str]:
    """200 texts: the odd ones, words, and both with special tokens between."""
    rng, found = random.Random(2), list(ODD)
    while len(found) < 200:
        parts = rng.choices([*WORDS, *ODD[3:]], k=rng.randint(1, 8))
        glue = rng.choice([" ", "", "  ", "\n", *(special if len(found) % 2 else ())])
        found.append(glue.join(parts))
    return found


def conversations() -> list[list[dict[str, str]]]:
    """20 conversations of 1 to 5 turns, every third with a system message."""
    rng, found = random.Random(3), []
    for number in range(20):
        messages = [{"role": "system", "content": "Short. é"}] if number % 3 == 0 else []
        for turn in range(1 + 2 * (number % 3)):
            text = " ".join(rng.choices([*WORDS, *ODD[5:20]], k=6))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
        found.append(messages)
    return found


def sentencepiece_model(path: Path, **options: Any) -> None:
    """`tokenizer.model`, a BPE with byte fallback, as Llama's."""
    import sentencepiece

    output = io.BytesIO()
    defaults: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=output,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **defaults | options,
    )
    (path / "tokenizer.model").write_bytes(output.getvalue())


def byte_level(path: Path, pre: list[Any], special: list[str], *, split: bool = False, **extra: Any) -> None:
    """A byte-level BPE as tokenizer.json, or `split` into vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    document = json.loads(tokenizer.to_str())
    if split:
        (path / "vocab.json").write_text(json.dumps(document["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = "\n".join(" ".join(merge) for merge in document["model"]["merges"])
        (path / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
        return
    tokenizer.add_special_tokens(special)
    document = json.loads(tokenizer.to_str())
    document["model"] |= extra.pop("model", {})
    (path / "tokenizer.json").write_text(json.dumps(document | extra, ensure_ascii=False), encoding="utf-8")


def _llama3(path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    regex = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{rest}"
    pre = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [480], "tokens": ["<|begin_of_text|>"]}
        },
    }
    byte_level(path, pre, list(_LLAMA3), model={"ignore_merges": True}, post_processor=around)


def _mistral(path: Path) -> None:
    """A tokenizer.json of the newer kind, a blank in front of the first piece only."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    sentencepiece_model(path)
    extracted = SentencePieceExtractor(str(path / "tokenizer.model")).extract(models.BPE)
    vocab, merges = extracted["vocab"], extracted["merges"]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    texts = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in texts])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer.model").unlink()


def _qwen2(path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    pre = [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    byte_level(path, pre, [], split=True)


def _smollm2(path: Path) -> None:
    from tokenizers import pre_tokenizers

    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    byte_level(path, pre, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def _yi(path: Path) -> None:
    sentencepiece_model(path, user_defined_symbols=["<|im_start|>", "<|im_end|>", "\u2581\u2581\u2581", "\n\n"])


_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_SP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
_FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
_ADDED = {
    str(448 + index): {"content": text, **_FLAGS}
    for index, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
}
_YI_ADDED = {str(3 + index): {"content": text, **_FLAGS} for index, text in enumerate(("<|im_start|>", "<|im_end|>"))}
FAMILIES = {
    "llama2": Family(
        sentencepiece_model,
        {**_SP, "legacy": True, "add_bos_token": True, "add_eos_token": False, "chat_template": INST},
        ("<s>", "</s>"),
        has_model=True,
    ),
    "llama3": Family(
        _llama3,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": LLAMA3,
        },
        _LLAMA3,
    ),
    "mistral": Family(
        _mistral, {**_SP, "legacy": False, "add_bos_token": True, "chat_template": INST}, ("<s>", "[INST]", "[/INST]")
    ),
    "qwen2": Family(
        _qwen2,
        {
            "added_tokens_decoder": _ADDED,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": CHATML,
        },
        ("<|im_start|>", "<|im_end|>"),
    ),
    "yi": Family(
        _yi,
        {**_SP, "legacy": True, "add_bos_token": False, "added_tokens_decoder": _YI_ADDED, "chat_template": CHATML},
        ("<s>", "<|im_start|>", "<|im_end|>"),
        has_model=True,
    ),
    "smollm2": Family(
        _smollm2,
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TOJSON,
        },
        ("<|im_start|>", "<|im_end|>"),
    ),
}


def segments(model: Any, text: str, special: dict[str, int]) -> list[int]:
    """SentencePiece's ids of the pieces between special tokens, as Hugging Face's `legacy` class cuts them."""
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [special[part]] if part in special else model.encode(part)
    return ids


def record(name: str, out: Path) -> str:
    """Write one family's files and golden.json; one line about where the two references differ."""
    import sentencepiece
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return STRFTIME

    chat_template_utils.datetime = Clock
    family, path = FAMILIES[name], out / name
    path.mkdir(parents=True, exist_ok=True)
    family.make(path)
    (path / "tokenizer_config.json").write_text(json.dumps(family.settings, indent=1), encoding="utf-8")
    reference = AutoTokenizer.from_pretrained(str(path))
    texts = strings(family.special)
    golden: dict[str, Any] = {"strings": [[text, reference(text).input_ids] for text in texts]}
    differing = {}
    if family.has_model:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        special = {text: model.piece_to_id(text) for text in ("<unk>", "<s>", "</s>", *family.special)}
        bos = [1] if family.settings["add_bos_token"] else []
        for index, (text, ids) in enumerate(golden["strings"]):
            if ids != (found := [*bos, *segments(model, text, special)]):
                differing[index] = found
    golden["sentencepiece_instead"] = differing
    golden["conversations"] = [
        [messages, reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)]
        for messages in conversations()
    ]
    if family.has_model:
        texts = [
            reference.apply_chat_template(m, add_generation_prompt=True, tokenize=False)
            for m, _ in golden["conversations"]
        ]
        for pair, text in zip(golden["conversations"], texts, strict=True):
            pair.append(segments(model, text, special))
    (path / "golden.json").write_text(json.dumps(golden, ensure_ascii=False), encoding="utf-8")
    return f"{name}: {len(golden['strings'])} strings, SentencePiece differs from transformers in {len(differing)}"


def main() -> None:
    """Record every family."""
    parser = argparse.ArgumentParser(prog="python -m experiments.record_tokenizers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name in FAMILIES:
        print(record(name, out))


if __name__ == "__main__":
    main()
