"""Tiny random models of every family and layout that can be imported, and what transformers 5 makes of them.

`python -m experiments.families --record tests/golden/families.npz` needs transformers 5 beside this package (an
environment of its own: the package's tests pin 4.33.3) and records logits. `--compare` imports the same models
and prints the largest difference at every position.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dvi_jax.errors import ArgumentParser, UserError, add_debug, run_cli
from dvi_jax.importing.safetensors_file import write_safetensors
from dvi_jax.importing.weight_files import SAFETENSORS, SAFETENSORS_INDEX, TORCH_INDEX

POSITIONS = 600
KEPT = (*range(16), *range(24, POSITIONS, 25), POSITIONS - 1)  # positions whose logits are recorded
VOCAB_SIZE = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_V5 = {"transformers_version": "5.24.0", "dtype": "float32"}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
# What each adds to, or changes of, `_SIZES`; keys as the model hubs have them.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama 2": _LLAMA | {"num_key_value_heads": 4, "max_position_embeddings": 2048},
    "llama 3.1, tied": _LLAMA
    | {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
    "llama, transformers 5": _LLAMA | _V5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama, both kinds of rope keys": _LLAMA
    | {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "vicuna 16k": _LLAMA
    | {"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": 4},
    "yi": _LLAMA | {"rope_theta": 5000000.0, "eos_token_id": 2, "bos_token_id": 1},
    "mistral 0.3": _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None},
    "mistral nemo": _MISTRAL | {"head_dim": 16, "rope_theta": 1000000.0, "sliding_window": None},
    "mistral, window past its context": _MISTRAL | {"sliding_window": 4096},
    "qwen2": _QWEN2 | {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 16},
    "qwen2.5, tied": _QWEN2
    | {"rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False, "max_window_layers": 1},
    "qwen2, transformers 5": _QWEN2
    | _V5
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "layer_types": ["full_attention"] * 3},
}
_LAYOUTS = {"vicuna 16k": "bin shards", "mistral 0.3": "shards", "mistral nemo": "shards", "yi": "old names"}


@dataclass(frozen=True)
class Case:
    """One model: its `config.json`, its weights by Hugging Face's names, and how they lie in files."""

    name: str
    config: dict[str, Any]
    layout: str = "whole"
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, directory: Path, layout: str | None = None) -> Path:
        """The model as a Hugging Face directory."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        layout = layout or self.layout
        if layout == "whole":
            write_safetensors(directory / SAFETENSORS, self.tensors)
        elif layout == "old names":
            renames = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
            write_safetensors(directory / SAFETENSORS, {_renamed(k, renames): v for k, v in self.tensors.items()})
        else:
            self._write_shards(directory, torch_files=layout == "bin shards")
        return directory

    def _write_shards(self, directory: Path, torch_files: bool) -> None:
        names = sorted(self.tensors)
        weight_map: dict[str, str] = {}
        for number in (1, 2):
            held = {name: self.tensors[name] for name in names[number - 1 :: 2]}
            suffix = "bin" if torch_files else "safetensors"
            shard = f"{'pytorch_model' if torch_files else 'model'}-{number:05d}-of-00002.{suffix}"
            if torch_files:
                from conversion.torch_file import write_torch

                write_torch(directory / shard, held)
            else:
                write_safetensors(directory / shard, held)
            weight_map |= dict.fromkeys(held, shard)
        index = TORCH_INDEX if torch_files else SAFETENSORS_INDEX
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def cases() -> Iterator[Case]:
    """Every model, its weights a function of its place in the table."""
    for seed, (name, changes) in enumerate(_CONFIGS.items()):
        config = _SIZES | changes
        yield Case(name, config, _LAYOUTS.get(name, "whole"), _random_tensors(config, seed))


def prompt(vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """`POSITIONS` token ids."""
    return np.random.default_rng(600).integers(3, vocab_size, POSITIONS)


def _random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    rows = {"q": config["num_attention_heads"] * size}
    rows["k"] = rows["v"] = config["num_key_value_heads"] * size
    norms = ["model.norm.weight"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, width)
    for prefix in (f"model.layers.{layer}" for layer in range(config["num_hidden_layers"])):
        norms += [f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]
        shapes |= {f"{prefix}.self_attn.{part}_proj.weight": (count, width) for part, count in rows.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{prefix}.self_attn.{part}_proj.bias": (count,) for part, count in rows.items()}
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, rows["q"])
        shapes |= {f"{prefix}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, inner)
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight")) else shape[1] ** -0.5
        tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return tensors | {name: 1 + 0.1 * rng.standard_normal(width, np.float32) for name in norms}


def _renamed(name: str, renames: dict[str, str]) -> str:
    return ".".join(renames.get(part, part) for part in name.split("."))


def transformers_logits(case: Case) -> np.ndarray:
    """float32 [POSITIONS, V] by transformers 5."""
    import torch
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(f"logits to compare with need transformers 5, this is {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        layout = "whole" if case.layout == "old names" else None  # of code that came with the weights
        directory = case.write(Path(folder) / "model", layout)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            return model(torch.from_numpy(prompt())[None]).logits[0].numpy()


def own_logits(case: Case) -> np.ndarray:
    """float32 [POSITIONS, V] by this package, imported from the case's directory."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dvi_jax.importing.source import load_base, open_source
    from dvi_jax.model.llama import Llama

    with tempfile.TemporaryDirectory() as folder:
        source = open_source(case.write(Path(folder) / "model"))
        base = load_base(source, "float32")
    definition, weights = nnx.split(Llama(source.config, base, exit_layer=1))

    @jax.jit
    def forward(weights: nnx.State) -> jax.Array:
        llama, positions = nnx.merge(definition, weights), jnp.arange(POSITIONS)[None]
        hidden, _, _ = llama.shallow(jnp.asarray(prompt())[None], None, positions)
        final, _, _ = llama.deep(hidden, None, positions)
        return llama.logits(final)[0]

    return np.asarray(forward(weights))


def main() -> None:
    """Record, or compare."""
    parser = ArgumentParser(prog="python -m experiments.families", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="write transformers' logits")
    parser.add_argument("--compare", action="store_true", help="compare every position with transformers 5 here")
    add_debug(parser)
    options = parser.parse_args()
    if options.record:
        recorded: dict[str, Any] = {case.name: transformers_logits(case)[list(KEPT)] for case in cases()}
        np.savez_compressed(options.record, **recorded)
    if options.compare:
        for case in cases():
            expected, found = transformers_logits(case), own_logits(case)
            difference = np.abs(found - expected)
            print(
                f"{case.name:34} {case.layout:10} largest difference {difference.max():.2e} of logits up to"
                f" {np.abs(expected).max():.1f}; {int((found.argmax(-1) == expected.argmax(-1)).sum())} of {POSITIONS}"
                " greedy ids equal"
            )


if __name__ == "__main__":
    sys.exit(run_cli(main))
