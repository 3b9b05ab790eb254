"""What is fuzzed: every parser of files from outside, with the valid files it starts from.

A parser's `run` gets a folder with the case's files. It must return or raise `UserError`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.fuzz import seeds
from experiments.fuzz.mutate import Seed, text_seed

MOST_OVERRIDES = 100  # no command line has more
_PROBES = ("", "ab \u2581ab", "<s>a b1\n\n  x\u00e9\U0001f600")

_YAML_WORDS = (
    *(b"!!python/object/apply:os.getcwd []", b"!!int x", b"!!timestamp x", b"!!float x", b"!!binary x", b"!!set {a}"),
    *(b"&a [*a]", b"*a", b"<<: *a", b"&a", b"2001-99-99", b"1:99:99", b"0x" + b"f" * 4000, b".nan", b".inf", b"0b1"),
    *(
        b"|",
        b">",
        b"? ",
        b"- ",
        b"---\n",
        b"%YAML 9.9\n",
        b"\t",
        b"#",
        b"'",
        b'"',
        b"\n  ",
        b"{a: 1}",
        b"trainer: distill\n",
    ),
    b"x: &x [l,l,l,l,l,l,l,l]\ny: &y [*x,*x,*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y,*y]\nprompts: [*z,*z,*z,*z,*z]\n",
)
_STREAM_WORDS = (
    b'{"id": "a", ',
    b'"}]}, {"id": 1,',
    b'\n{"messages": [',
    b'"from"',
    b'"human"',
    b"\n",
    b'"\\ud83d"',
    b"\x28\xb5\x2f\xfd",
    b"\x1f\x8b",
    b"\xff\xfe",
    b"\r",
    b"PAR1",
    b'{"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_calls": [{}]}',
)
_GGUF_WORDS = (
    b"GGUF",
    b"\xff" * 8,
    bytes(8),
    b"\xff" * 4,
    bytes(4),
    b"llama.expert_count",
    b"rope_freqs.weight",
    b"general.alignment",
)
_TOKENIZER_WORDS = (
    *(b'"Unigram"', b'"WordPiece"', b'"WordLevel"', b'"####"', b'{"Regex": "(a+)+$"}', b'{"Regex": ""}', b'"Strip"'),
    *(b'"NFKC"', b'"Prepend"', b'"Precompiled"', b'"Bert"', b'"Metaspace"', b'"Template"', b"[0, 1]", b'["a", "b"]'),
    *(
        b'"prepend_scheme": "first", "split": false',
        b'"ignore_merges": true',
        b'"normalized": true',
        b'"legacy": false',
    ),
)
_PICKLE_WORDS = (
    *(b"(", b"t", b"R", b"b", b"s", b"u", b"0", b"2", b"h\x00", b"q\x00", b".", b"]", b"}", b"\x85", b"\x86", b"Q"),
    *(b"cos\nsystem\n", b"c__builtin__\nbytearray\n", b"K\xff", b"\x8a\x08" + b"\xff" * 8, b"J\xff\xff\xff\x7f"),
    b"h\x00h\x00\x86q\x00" * 60,
)


@dataclass(frozen=True)
class Parser:
    """`seeds`: alternatives of file name -> valid file; `words`: what the format's mutations also insert."""

    name: str
    seeds: tuple[dict[str, Seed], ...]
    run: Callable[[Path], object]
    words: tuple[bytes, ...] = ()


def train_config() -> Parser:
    """`python -m dvi_jax.train`'s settings: the YAML file and its `--set` overrides."""
    from dvi_jax.config import load_train_config

    def run(folder: Path) -> None:
        overrides = (folder / "overrides").read_bytes().decode("utf-8", "surrogateescape").split("\n")
        load_train_config(folder / "config.yaml", [line for line in overrides if line][:MOST_OVERRIDES])

    files = {seeds.TRAIN_YAML: "prompts=10\noptimizer.lora_lr=0.001\n", seeds.DISTILL_YAML: "lr=0.01\n"}
    found = [{"config.yaml": text_seed(text), "overrides": text_seed(lines)} for text, lines in files.items()]
    return Parser("train config", tuple(found), run, _YAML_WORDS)


def checkpoint() -> Parser:
    """A checkpoint directory's own files: config.json and MANIFEST.json."""
    from dvi_jax.checkpoint import read_checkpoint, read_manifest
    from dvi_jax.config import LlamaConfig
    from dvi_jax.errors import UserError
    from dvi_jax.model.llama import base_shapes
    from dvi_jax.text_files import read_json

    def run(folder: Path) -> None:
        base_shapes(LlamaConfig.from_json(read_json(folder / "config.json")))
        read_manifest(folder)
        try:
            read_checkpoint(folder)
        except UserError as error:
            if "base is missing" not in str(error):  # the arrays, which no case has
                raise

    config = seeds.json_seed(seeds.LLAMA)
    checksums = {"config.json": hashlib.sha256(config.whole()).hexdigest()}
    manifests = seeds.MANIFEST, seeds.MANIFEST | {"checksums": checksums}
    found = [{"config.json": config, "MANIFEST.json": seeds.json_seed(manifest)} for manifest in manifests]
    return Parser(
        "checkpoint", tuple(found), run, (b'"base"', b'"llama3"', b'"checksums"', b'"../x"', b'"config.json"')
    )


def conversations() -> Parser:
    """Conversation streams, plain and packed."""
    from dvi_jax.data.conversations import ConversationStream

    def run(folder: Path) -> None:
        for conversation in ConversationStream(sorted(folder.iterdir())):
            assert any(message.role == "user" and message.content.strip() for message in conversation.messages)

    names = ("data.json", "data.jsonl", "data.txt", "data.gz", "data", "data.zst")
    found = [{name: seed} for name, seed in zip(names, seeds.conversation_seeds(), strict=True)]
    found.append(
        {
            "utf16.txt": text_seed(
                "\ufeffWhat?\r\nAnd?\r", lambda text: text.decode("utf-8", "replace").encode("utf-16-le")
            )
        }
    )
    return Parser("conversations", tuple(found), run, _STREAM_WORDS)


def questions() -> Parser:
    """Spec-Bench question files."""
    from dvi_jax.evaluate.spec_bench import read_questions

    def run(folder: Path) -> None:
        assert read_questions(folder / "question.jsonl")

    lines = "\n".join(map(json.dumps, seeds.QUESTIONS))
    return Parser("questions", ({"question.jsonl": text_seed(lines)},), run, _STREAM_WORDS)


def safetensors() -> Parser:
    """Headers of safetensors files, and reading what they describe."""
    from dvi_jax.importing.safetensors_file import SafetensorsFile

    seed = seeds.safetensors_seed({"a": [2, 3], "b.weight": [4], "c": [1, 1, 2]})
    words = (b'"F16"', b'"F64"', b'"BF16"', b'"I64"', b'"BOOL"', b'"F8_E4M3"', b'"__metadata__"', b"[0, 0]", b"[0]")
    return Parser(
        "safetensors",
        ({"model.safetensors": seed},),
        lambda folder: _read_all(SafetensorsFile(folder / "model.safetensors")),
        words,
    )


def gguf() -> Parser:
    """GGUF files: container, config, tokenizer and weights."""
    from dvi_jax.importing.layout import GGUF_NAMES
    from dvi_jax.importing.source import load_base, open_source

    def run(folder: Path) -> None:
        load_base(open_source(folder / "model.gguf"), "float32")

    shapes = seeds.model_shapes(GGUF_NAMES)
    found = [{"model.gguf": seeds.gguf_seed(shapes, seeds.gguf_metadata(kind))} for kind in ("gpt2", "llama")]
    biased = seeds.model_shapes(GGUF_NAMES, biased=True)
    found.append({"model.gguf": seeds.gguf_seed(biased, seeds.gguf_metadata("llama", "qwen2"))})
    return Parser("gguf", tuple(found), run, _GGUF_WORDS)


def gguf_parts() -> Parser:
    """A GGUF file in two parts."""
    from dvi_jax.importing.layout import GGUF_NAMES
    from dvi_jax.importing.source import load_base, open_source

    names = [f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    shapes = list(seeds.model_shapes(GGUF_NAMES, biased=True).items())
    files = {}
    for number, name in enumerate(names):
        metadata = {"split.no": number, "split.count": 2} | (
            seeds.gguf_metadata("llama", "qwen2") if not number else {}
        )
        files[name] = seeds.gguf_seed(dict(shapes[number::2]), metadata)
    words = (*_GGUF_WORDS, b"split.count", b"split.no")
    return Parser("gguf parts", (files,), lambda folder: load_base(open_source(folder / names[0]), "float32"), words)


def trained_parts() -> Parser:
    """The drafter and LoRA sets in a Hugging Face directory: the manifest's values, and safetensors."""
    from dvi_jax.importing.weight_files import SAFETENSORS
    from dvi_jax.trained_parts import DRAFTER, LORA, read_trained_parts

    def run(folder: Path) -> None:
        for part in (DRAFTER, LORA):
            (folder / part).mkdir()
            (folder / part / SAFETENSORS).write_bytes((folder / part).with_suffix(".safetensors").read_bytes())
        (folder / DRAFTER / "config.json").write_bytes((folder / "config.json").read_bytes())
        read_trained_parts(folder)

    files = {
        "config.json": seeds.json_seed(seeds.MANIFEST),
        f"{DRAFTER}.safetensors": seeds.safetensors_seed({"norm": [8], "scale": [], "lora.a": [2, 8]}),
        f"{LORA}.safetensors": seeds.safetensors_seed({"lora_s.drafter.a": [2, 8], "lora_s.drafter.b": [8, 2]}),
    }
    words = (b'"norm.a"', b'"lora"', b'"lora.a.b"', b'".."', b'"."', b'"F16"', b'"I64"', b"[]", b"[0]")
    return Parser("trained parts", (files,), run, words)


def tokenizer() -> Parser:
    """Tokenizers of a model directory, then what a checkpoint's own are used for."""
    from dvi_jax.data.conversations import Message
    from dvi_jax.data.tokenizer import Tokenizer
    from dvi_jax.importing import tokenizer as source

    def run(folder: Path) -> None:
        source.chat_template(folder)  # rendering it has a process of its own, with limits
        special = source.special_tokens(folder)
        with contextlib.redirect_stderr(io.StringIO()):  # notes of tokens left out
            text = source.from_directory(folder, 16)
        if text is None:
            return
        loaded = Tokenizer(text, bos_token_id=1, eos_token_ids=(2,), special_tokens=special)
        for probe in _PROBES:
            ids = loaded.encode(probe, add_special_tokens=True)
            assert all(0 <= token < loaded.vocab_size for token in ids)
            loaded.decode(ids)
        loaded.encode_conversation([Message("user", "a"), Message("assistant", "b")])
        source.token_text(text, 1)

    settings = {"add_bos_token": True, "chat_template": seeds.CHAT_TEMPLATE}
    named = [{"name": "default", "template": "x"}, {"name": "tool", "template": "y"}]
    added = {"chat_template": named, "added_tokens_decoder": {"9": {"content": "<more>", "special": False}}}
    fast = {
        "tokenizer.json": seeds.json_seed(seeds.byte_level_tokenizer()),
        "tokenizer_config.json": seeds.json_seed(settings),
    }
    slow = {
        "tokenizer.model": seeds.sentencepiece_seed(),
        "added_tokens.json": seeds.json_seed({"<pad>": 8}),
        "tokenizer_config.json": seeds.json_seed(added),
    }
    beside = {
        "tokenizer.json": seeds.json_seed(seeds.metaspace_tokenizer()),
        "special_tokens_map.json": seeds.json_seed({"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        "added_tokens.json": seeds.json_seed({"<pad>": 16, "<|end|>": 8}),
        "tokenizer_config.json": seeds.json_seed(added | {"additional_special_tokens": ["<|new|>"], "legacy": False}),
    }
    merges = {
        "vocab.json": seeds.json_seed({token: index for index, token in enumerate(seeds.TOKENS)}),
        "merges.txt": text_seed("#version: 0.2\na b\n\u2581 ab\n"),
        "tokenizer_config.json": seeds.json_seed({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}),
    }
    rules = {
        "tokenizer.model": seeds.sentencepiece_seed(with_rules=True),
        "tokenizer_config.json": seeds.json_seed({"legacy": False, "bos_token": "<s>"}),
    }
    return Parser("tokenizer", (fast, slow, beside, merges, rules), run, _TOKENIZER_WORDS)


def model_directory() -> Parser:
    """A Hugging Face directory: config, generation config, index of the shards, one shard."""
    from dvi_jax.importing.layout import HF_NAMES
    from dvi_jax.importing.source import load_base, open_source
    from dvi_jax.importing.weight_files import SAFETENSORS_INDEX

    shard, found = "model-1.safetensors", []
    for config in (seeds.HF_CONFIG, seeds.HF_MISTRAL, seeds.HF_QWEN2):
        shapes = seeds.model_shapes(HF_NAMES, biased=config is seeds.HF_QWEN2)
        files = {
            "config.json": seeds.json_seed(config),
            "generation_config.json": seeds.json_seed({"eos_token_id": 2}),
            SAFETENSORS_INDEX: seeds.json_seed({"weight_map": dict.fromkeys(shapes, shard)}),
            shard: seeds.safetensors_seed(shapes),
        }
        found.append(files)
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    words = (
        pointer,
        b'"sliding_window"',
        b'"model-2.safetensors"',
        b'"../model-1.safetensors"',
        b'"a\\u0000b"',
        b'"yarn"',
        b'"linear"',
    )
    return Parser("model directory", tuple(found), lambda folder: load_base(open_source(folder), "float32"), words)


def torch_file() -> Parser:
    """`pytorch_model.bin`."""
    from conversion.torch_file import TorchFile

    found = [{"pytorch_model.bin": seed} for seed in seeds.torch_seeds()]
    return Parser(
        "torch file", tuple(found), lambda folder: _read_all(TorchFile(folder / "pytorch_model.bin")), _PICKLE_WORDS
    )


def packed_text() -> Parser:
    """What `trainer: distill` learns from, packed before."""
    from dvi_jax.learn.packing import load_packed

    words = (b"<u2", b"|u1", b"<f4", b"|O", b"(2, 12)", b"(2, 2)", b"()", b"(-1, 2)", b"True", b"\x93NUMPY")
    found = [{"text.npz": seed} for seed in seeds.packed_seeds()]
    return Parser("packed text", tuple(found), lambda folder: load_packed([folder / "text.npz"]), words)


def _read_all(source: Any) -> None:
    """Every row of every tensor of a `TensorSource` that has rows."""
    for name, shape in source.shapes.items():
        if shape:
            assert sum(len(values) for _, values in source.chunks(name)) == shape[0]


_MAKERS = (
    train_config,
    checkpoint,
    conversations,
    questions,
    safetensors,
    gguf,
    gguf_parts,
    trained_parts,
    tokenizer,
    model_directory,
    torch_file,
    packed_text,
)
# Made on demand: each imports what it needs.
PARSERS: dict[str, Callable[[], Parser]] = {
    maker.__name__.replace("_", " "): functools.cache(maker) for maker in _MAKERS
}
