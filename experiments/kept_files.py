"""GGUF files whose integers are kept: is the model the file's, and how much memory does it take?

    python -m experiments.kept_files --out kept_files.json
    python -m experiments.kept_files --source MODEL.gguf --kinds Q8_0 --new-tokens 128

Of a GGUF file, SmolLM2's unless told otherwise, one is made for each kind: every matrix dequantised and quantised anew,
by the gguf package. Each is imported twice, with its own integers and dequantised. Compared are the greedy ids of a few
prompts, decoded speculatively, and the logits at each of their positions, in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from conversion.importing import import_model
from dvi_jax.config import DecodeConfig
from dvi_jax.data import Message
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.memory import tree_bytes
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.loading import LoadedModel, load
from dvi_jax.model.speculative_llama import join
from dvi_jax.quantisation import Quantisation
from experiments.fetch import fetch_model
from experiments.measure import environment, settings_of, write_result

WEIGHTS = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "Why is the sky blue?")
MOST_DIFFERENCE = 2e-5  # of the largest logit: float32 rounding through 30 layers


def main() -> int:
    """Make, import and compare the files; exit status 1 where a model is not the file's."""
    parser = ArgumentParser(prog="python -m experiments.kept_files", description=__doc__)
    parser.add_argument("--source", type=Path, metavar="FILE.gguf", help="default: SmolLM2, fetched into the cache")
    parser.add_argument("--kinds", nargs="+", choices=sorted(WEIGHTS), default=sorted(WEIGHTS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    source = options.source or fetch_model()
    result: dict[str, Any] = {"environment": environment(), "settings": settings_of(options), "kinds": {}}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found = compared(source, kind, Path(folder), options.new_tokens)
        result["kinds"][kind] = found
        print(kind, " ".join(f"{name}={value}" for name, value in found.items()), flush=True)
        if options.out:
            write_result(options.out, result)
    return 0 if all(found["equal"] for found in result["kinds"].values()) else 1


def compared(source: Path, kind: str, folder: Path, new_tokens: int) -> dict[str, Any]:
    """What the table says of a kind."""
    path = folder / f"{kind}.gguf"
    requantise(source, path, Kind[kind])
    import_model(path, folder / "kept", quantisation=Quantisation(weights=WEIGHTS[kind]))
    import_model(path, folder / "whole")
    kept, whole = load(folder / "kept"), load(folder / "whole")
    tokenizer = kept.need_tokenizer("the file has no tokenizer")
    prompts = [tokenizer.chat([Message("user", question)]) for question in QUESTIONS]
    settings = DecodeConfig(max_new_tokens=new_tokens, draft_steps=3)
    ours, theirs = (generate_batch(model, prompts, settings)[0] for model in (kept, whole))
    differences = [difference(kept, whole, generation.output_ids) for generation in theirs]
    same = [one.new_ids == other.new_ids for one, other in zip(ours, theirs, strict=True)]
    return {
        "equal": all(same) and max(differences) <= MOST_DIFFERENCE,
        "new_tokens": [len(one.new_ids) for one in ours],
        "equal_ids": same,
        "logits_differ_by": max(differences),
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "weights_mb": round(tree_bytes(kept.params.base) / 1e6, 1),
        "dequantised_mb": round(tree_bytes(whole.params.base) / 1e6, 1),
    }


def requantise(source: Path, target: Path, kind: Kind) -> None:
    """Write `source`'s metadata and tensors, its matrices as `kind` and all others in float32."""
    reader = gguf.GGUFReader(source)
    fields = reader.fields
    writer = gguf.GGUFWriter(target, fields[gguf.Keys.General.ARCHITECTURE].contents())
    for name, field in fields.items():
        if name == gguf.Keys.General.ARCHITECTURE or name.startswith("GGUF."):
            continue  # the writer's own
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_list else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def difference(one: LoadedModel, other: LoadedModel, ids: list[int]) -> float:
    """The largest difference between two models' logits at any position of `ids`, against the largest logit."""
    tokens = jnp.asarray([ids])
    positions = jnp.arange(len(ids))[None]

    def logits(model: LoadedModel) -> np.ndarray:
        llama = join(model.definition, model.params).llama
        return np.asarray(llama.logits(llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)[0]))

    found, expected = logits(one), logits(other)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    sys.exit(run_cli(main))
