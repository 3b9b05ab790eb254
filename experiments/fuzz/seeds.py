"""The valid files that fuzzing starts from, each a few kilobytes, split into the tokens of its format."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import zstandard

from experiments.fuzz.mutate import Seed, text_seed

LLAMA = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {"kind": "linear", "factor": 2.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_ids": [2],
}
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
HF_MISTRAL = HF_CONFIG | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 64,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
}
HF_QWEN2 = HF_CONFIG | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
}
MANIFEST = {
    "source": "tiny",
    "source_sha256": "00",
    "dtype": "float32",
    "exit_layer": 1,
    "drafter": "exit_head",
    "drafter_config": {"rank": 4, "alpha": 4.0},
    "lora": {"rank_s": 4, "alpha_s": 4.0},
    "training_step": 3,
    "verifier": "base",
    "base_sha256": "",
    "format_version": 1,
}
CONVERSATIONS = [
    {
        "id": "a",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello \u00e9\U0001f600"}],
    },
    {
        "id": 7,
        "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": 'Quote "}, {\\"id\\": ['}],
    },
    {"messages": [{"role": "user", "content": "Third\nquestion"}, {"role": "assistant", "content": "Yes"}]},
]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    {"question_id": "x", "category": "qa", "turns": ["Who?"], "reference": [1, None]},
]
TRAIN_YAML = """# Online learning.
checkpoint: runs/model
out: runs/demo
exit_layer: 8
prompts: 2000
max_minutes: 7
rollout_batch: 8
positions_per_update: 256
data:
  files: [runs/conversations.json]
  turns: all
  held_out_fraction: 0.05
decode:
  draft_steps: 2
  max_new_tokens: 32
drafter: exit_head
drafter_options: {rank: 64, alpha: 64}
objective:
  schedule: linear
  kl_min: 0.5
optimizer:
  lora_lr: 4.0e-3
"""
DISTILL_YAML = """trainer: distill
checkpoint: runs/model
out: runs/distill
data: [runs/packed/text.npz]
drafter: fused
exit_layer: 1
tokens: 32000000
learn_from: all
lr: 1.0e-3
unroll_decay: 0.8
seed: 3
"""
TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def json_seed(value: object) -> Seed:
    """A JSON text."""
    return text_seed(json.dumps(value))


def conversation_seeds() -> list[Seed]:
    """An array, lines, text, and the first two packed."""
    array, lines = json.dumps(CONVERSATIONS, indent=1), "\n".join(map(json.dumps, CONVERSATIONS)) + "\n"
    return [
        text_seed(array),
        text_seed(lines),
        text_seed("What is this?\nA second question [x]\n"),
        text_seed(lines, lambda text: gzip.compress(text, mtime=0)),
        text_seed(array, zstandard.compress),
        text_seed(lines, lambda text: b"".join(zstandard.compress(line) for line in text.splitlines(keepends=True))),
    ]


def safetensors_seed(names: Mapping[str, list[int]]) -> Seed:
    """float32 tensors of zeros; a damaged header is still announced with its length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in names.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return text_seed(json.dumps(header), lambda text: struct.pack("<Q", len(text)) + text + bytes(end))


def model_shapes(names: Mapping[str, str], biased: bool = False) -> dict[str, list[int]]:
    """Shapes of the tensors of `LLAMA` under a source's names (`dvi_jax.importing.layout`), with biases or without."""
    width, inner, vocab, kv = 8, 16, 8, 4
    layer = {
        "attn_norm": [width],
        "q": [width, width],
        "k": [kv, width],
        "v": [kv, width],
        "out": [width, width],
        "mlp_norm": [width],
        "gate": [inner, width],
        "up": [inner, width],
        "down": [width, inner],
        **({"q_bias": [width], "k_bias": [kv], "v_bias": [kv]} if biased else {}),
    }
    shapes = {names[key].format(i=i): shape for i in range(2) for key, shape in layer.items()}
    return {names["embed"]: [vocab, width], **shapes, names["norm"]: [width], names["head"]: [vocab, width]}


def gguf_seed(shapes: Mapping[str, list[int]], metadata: Mapping[str, Any]) -> Seed:
    """A GGUF file of zeros; every field of its header is a token."""
    tokens = [b"GGUF", struct.pack("<I", 3), struct.pack("<Q", len(shapes)), struct.pack("<Q", len(metadata))]
    for key, value in metadata.items():
        tokens += [*_text(key), *_value(value)]
    offset = 0
    for name, shape in shapes.items():
        tokens += [*_text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", n) for n in reversed(shape))]
        tokens += [struct.pack("<I", 0), struct.pack("<Q", offset)]
        offset += -(-4 * math.prod(shape) // 32) * 32
    return Seed(tuple(tokens), lambda header: header + bytes(-len(header) % 32 + offset))


def gguf_metadata(kind: str, name: str = "llama") -> dict[str, Any]:
    """What the GGUF of a model of architecture `name` says of itself, with a tokenizer of `kind` (gpt2 or llama)."""
    tokenizer: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if kind == "gpt2":
        tokenizer |= {"tokenizer.ggml.merges": ["a b", "\u2581 ab"], "tokenizer.ggml.pre": "smollm"}
    else:
        tokenizer |= {"tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]}
    return {
        "general.architecture": name,
        f"{name}.block_count": 2,
        f"{name}.context_length": 32,
        f"{name}.embedding_length": 8,
        f"{name}.feed_forward_length": 16,
        f"{name}.attention.head_count": 2,
        f"{name}.attention.head_count_kv": 1,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.scaling.type": "linear",
        f"{name}.rope.scaling.factor": 2.0,
        **tokenizer,
    }


def _text(value: str) -> list[bytes]:
    data = value.encode()
    return [struct.pack("<Q", len(data)), data]


def _value(value: Any) -> Iterator[bytes]:
    kinds = {int: (4, "<I"), float: (6, "<f")}
    if isinstance(value, list):
        yield struct.pack("<I", 9)
        yield struct.pack("<I", 8 if isinstance(value[0], str) else kinds[type(value[0])][0])
        yield struct.pack("<Q", len(value))
        for item in value:
            yield from _text(item) if isinstance(item, str) else [struct.pack(kinds[type(item)][1], item)]
    elif isinstance(value, str):
        yield struct.pack("<I", 8)
        yield from _text(value)
    else:
        number, code = kinds[type(value)]
        yield struct.pack("<I", number)
        yield struct.pack(code, value)


def byte_level_tokenizer() -> dict[str, Any]:
    """A `tokenizer.json` of eight tokens, with most of the parts that one can have."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(TOKENS[:3])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(TOKENS)},
            "merges": ["a b", "\u2581 ab"],
        },
    }


def metaspace_tokenizer() -> dict[str, Any]:
    """A `tokenizer.json` of the newer kind, which old releases of the library are handed in other words."""
    document = byte_level_tokenizer()
    pre = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return {**document, "normalizer": None, "pre_tokenizer": pre, "decoder": pre}


def sentencepiece_seed(*, with_rules: bool = False) -> Seed:
    """A `tokenizer.model`: pieces with text, score and kind, the trainer's and the normaliser's settings.

    `with_rules`: a user-defined symbol, and rules of normalisation (of a double array with no entry).
    """
    tokens: list[bytes] = []
    for index, piece in enumerate(TOKENS):
        text, kind = piece.encode(), 2 if index == 0 else 3 if index < 3 else 4 if with_rules and index == 6 else 1
        body = [b"\x0a", bytes([len(text)]), text, b"\x15", struct.pack("<f", -index), b"\x18", bytes([kind])]
        tokens += [b"\x0a", bytes([len(b"".join(body))]), *body]
    trainer = [b"\x18", b"\x02", b"\xc8\x02", b"\x01"]
    tokens += [b"\x12", bytes([len(b"".join(trainer))]), *trainer]
    if with_rules:  # 1024 bytes of array and an empty text: lengths of two bytes
        tokens += [b"\x1a", b"\x8a\x08", b"\x12", b"\x85\x08", struct.pack("<I", 1024), bytes(1024), b"\0"]
        return Seed((*tokens, b"\x18", b"\x01"))
    tokens += [b"\x1a", b"\x02", b"\x18", b"\x01"]
    return Seed(tuple(tokens))


def torch_seeds() -> list[Seed]:
    """A state dict in PyTorch's zip format, split at its pickle's instructions, and in the format before."""
    import torch

    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.nn.Parameter(torch.ones(2))}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(new) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    # The old format names storages by their address; fixed names keep the cases the same in every process.
    addresses = sorted(set(re.findall(rb"\d{9,}", old.getvalue())))
    data = old.getvalue()
    for index, address in enumerate(addresses):
        data = data.replace(address, str(index).zfill(len(address)).encode())
    return [Seed(_instructions(entries[name]), _zipped(entries, name)), Seed((data,))]


def packed_seeds() -> list[Seed]:
    """Packed text, compressed as it is written, and split at the header of each of its two arrays."""
    tokens, mask = np.arange(24, dtype=np.uint16).reshape(2, 12), np.full((2, 2), 240, np.uint8)
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "mask": mask}
    compressed, entries = io.BytesIO(), {}
    np.savez_compressed(compressed, tokens=tokens, mask=mask)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        entries[f"{name}.npy"] = buffer.getvalue()
    split = [text_seed(data, _zipped(entries, name)) for name, data in entries.items()]
    return [Seed((compressed.getvalue(),)), *split]


def _instructions(data: bytes) -> tuple[bytes, ...]:
    starts = [position for _, _, position in pickletools.genops(data)]
    return tuple(data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True))


def _zipped(entries: Mapping[str, bytes], name: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry, content in {**entries, name: data}.items():
                archive.writestr(zipfile.ZipInfo(entry), content)  # with a fixed date, so that a case stays the same
        return buffer.getvalue()

    return pack
