"""Models for parity tests: the golden ones imported into JAX, and random ones built on both sides from one seed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("mha", "gqa_tied")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Matrices this small lose time to a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=CASES)
def golden(request):
    """One golden directory: (path, the parsed golden.json)."""
    path = GOLDEN / request.param
    return path, json.loads((path / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def mha():
    """The golden directory of the model without grouped heads."""
    return GOLDEN / "mha"


def make_tensors(config, seed):
    """Random weights under Hugging Face's names, the adapter's under upstream's, float32 torch tensors.

    Wide weights and sharp logits, so that the best two are far apart; the layers leave enough of the embedding for the
    exit to guess some tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator) * std

    width, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer_std = 0.8 * width**-0.5
    base = {"model.embed_tokens.weight": normal(config.vocab_size, width, std=0.3 if config.tie_word_embeddings else 1)}
    for index in range(config.num_layers):
        shapes = {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        prefix = f"model.layers.{index}"
        base |= {f"{prefix}.{name}.weight": normal(*shape, std=layer_std) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            base[f"{prefix}.{name}.weight"] = 1 + normal(width, std=0.1)
    base["model.norm.weight"] = 1 + normal(width, std=0.1)
    if not config.tie_word_embeddings:
        base["lm_head.weight"] = normal(config.vocab_size, width)
    adapter = {
        f"layers.0.self_attn.{name}_proj.weight": normal(width, width, std=layer_std if name != "o" else 0.02)
        for name in "qkvo"
    }
    adapter["layers.0.input_layernorm.weight"] = 1 + normal(width, std=0.1)
    adapter["norm.weight"] = base["model.norm.weight"].clone()
    return base, adapter


def fused(tensors, config):
    """The base tree of a checkpoint, concatenated from named tensors."""

    def part(name):
        return tensors[f"{name}.weight"].numpy()

    base = {"embed": part("model.embed_tokens"), "norm": part("model.norm"), "layers": {}}
    if not config.tie_word_embeddings:
        base["head"] = part("lm_head")
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        base["layers"][str(index)] = {
            "attn_norm": part(f"{prefix}.input_layernorm"),
            "qkv": np.concatenate([part(f"{prefix}.self_attn.{name}_proj") for name in "qkv"]),
            "out": part(f"{prefix}.self_attn.o_proj"),
            "mlp_norm": part(f"{prefix}.post_attention_layernorm"),
            "gate_up": np.concatenate([part(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up")]),
            "down": part(f"{prefix}.mlp.down_proj"),
        }
    return base


def build_reference(config, tensors, adapter, exit_layer):
    """`kangaroo_ref` on the tensors, watching how close its decisions are."""
    from kangaroo_ref import KangarooModel, ModelConfig, build_kangaroo

    class Watched(KangarooModel):
        """Keeps in `closest` how near a decision came to going the other way.

        The distance between the best two logits of a row and, where one row is looked at, that of its confidence from
        `threshold`.
        """

        closest = float("inf")
        threshold = None

        def logits(self, normed):
            result = super().logits(normed)
            best = result.topk(2, dim=-1).values
            gaps = [(best[..., 0] - best[..., 1]).min().item()]
            if self.threshold is not None and normed.shape[1] == 1:
                gaps.append(abs(result.softmax(dim=-1).max().item() - self.threshold))
            self.closest = min(self.closest, *gaps)
            return result

    sizes = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    if config.rope_scaling is not None:  # as a Hugging Face config has it
        sizes["rope_scaling"] = {"rope_type": config.rope_scaling.kind, **vars(config.rope_scaling)}
    sizes = ModelConfig(**sizes)
    adapter_sizes = ModelConfig(**{**vars(sizes), "num_layers": 1, "num_kv_heads": config.num_heads})
    model = build_kangaroo(sizes, tensors, adapter_sizes, adapter, exit_layer)
    return Watched(model.base, model.adapter)


def build_jax(config, tensors, adapter, exit_layer):
    """The same weights as a `LoadedModel`."""
    from dvi_jax.checkpoint import Manifest
    from dvi_jax.loading import LoadedModel, build_model, restore_trained
    from dvi_jax.model.speculative_llama import split

    options = {"num_heads": config.num_heads, "num_kv_heads": config.num_heads, "rms_norm_eps": config.rms_norm_eps}
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="float32",
        exit_layer=exit_layer,
        drafter="kangaroo",
        drafter_config=options,
    )
    definition, params = split(build_model(config, manifest, fused(tensors, config)))
    layer = "layers.0.self_attn"
    drafter = {
        "attn_norm": adapter["layers.0.input_layernorm.weight"].numpy(),
        "qkv": np.concatenate([adapter[f"{layer}.{name}_proj.weight"].numpy() for name in "qkv"]),
        "out": adapter[f"{layer}.o_proj.weight"].numpy(),
        "norm": adapter["norm.weight"].numpy(),
    }
    return LoadedModel(
        config, manifest, definition, restore_trained(params, drafter, None, "the random adapter", config)
    )


@pytest.fixture(scope="session")
def both_sides():
    """From a config, a seed and an exit layer to (the reference, the JAX model) on the same weights."""

    def build(config, seed, exit_layer):
        tensors, adapter = make_tensors(config, seed)
        return (
            build_reference(config, tensors, adapter, exit_layer),
            build_jax(config, tensors, adapter, exit_layer),
        )

    return build


@pytest.fixture(scope="session")
def decode_alone():
    """decode_alone(model, prompt, ...): one generation, at shapes that all prompts of up to 48 tokens share.

    A program is compiled once for a model then, whatever the settings: rounds of 9 rows, of which `draft_steps` bounds
    those that are used, and caches of 128 slots.
    """
    import jax.numpy as jnp

    from dvi_jax.decode.batch import read_generations
    from dvi_jax.decode.prefill import prefill
    from dvi_jax.decode.speculative import decode_rounds
    from dvi_jax.decode.state import Knobs

    def decode(model, prompt, *, new_tokens, draft_steps, threshold, eos_ids):
        knobs, length = Knobs.make(draft_steps, threshold, eos_ids), len(prompt)
        state = prefill(
            model.definition,
            model.decode_params,
            jnp.asarray([prompt + [0] * (48 - length)], jnp.int32),
            jnp.asarray([length], jnp.int32),
            jnp.asarray([length + new_tokens], jnp.int32),
            knobs.eos_ids,
            slots=128,
            width=9,
        )
        state = decode_rounds(model.definition, model.decode_params, state, knobs)
        return read_generations(state, [length], eos_ids)[0]

    return decode
