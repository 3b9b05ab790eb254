"""Which architectures are a plain Llama or one with biases on q, k and v, and what the others have beyond that.

A family's defaults are those that Hugging Face's config classes give to keys that a config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dvi_jax.errors import UserError


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face: its name, its architecture, and what a config means that leaves a key out."""

    model_type: str
    architectures: tuple[str, ...]
    num_kv_heads: int | None  # None: as many as there are heads
    max_position_embeddings: int
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_id: int | None


_LLAMA = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM"), None, 2048, None, 1, 2)
_MISTRAL = Family("mistral", ("MistralForCausalLM",), 8, 131072, 4096, 1, 2)
_QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), 32, 32768, 4096, None, None)
# Yi began under its own name and is a Llama in all but the names of two norms.
FAMILIES = {"llama": _LLAMA, "Yi": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2}
GGUF_ARCHITECTURES = ("llama", "qwen2")  # Mistral, Yi and Vicuna are written as llama

_EXPERTS = "a mixture of experts"
_GEMMA = "a GELU, norms that scale by 1 + weight and a scaled embedding"
_QK_NORM = "norms of queries and keys (q_norm, k_norm)"
_LATENT = "attention through latent keys and values, and a mixture of experts"
_IMAGES = "an encoder of images"
_NO_ROPE = "layers without rotary positions"
_PARALLEL = "layer norms with a mean, and attention and MLP side by side"
_LEARNED = "learned positions, and layer norms with a mean"
# Names are compared without - and _, so that those of Hugging Face and of GGUF are one.
_MISSING = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, capped logits and sliding windows",
    "gemma3": f"{_GEMMA}, {_QK_NORM} and sliding windows",
    "gemma3text": f"{_GEMMA}, {_QK_NORM} and sliding windows",
    "qwen3": _QK_NORM,
    "olmo2": _QK_NORM,
    "qwen3moe": f"{_EXPERTS} and {_QK_NORM}",
    "qwen3next": f"{_EXPERTS} and linear attention",
    **dict.fromkeys(
        ("mixtral", "qwen2moe", "phimoe", "olmoe", "granitemoe", "dbrx", "grok", "grok1", "jamba"), _EXPERTS
    ),
    **dict.fromkeys(("llama4", "llama4text"), f"{_EXPERTS} and {_NO_ROPE}"),
    "gptoss": f"{_EXPERTS} and attention sinks",
    **dict.fromkeys(("deepseekv2", "deepseekv3", "deepseek2"), _LATENT),
    "smollm3": _NO_ROPE,
    **dict.fromkeys(("cohere", "cohere2", "commandr", "falcon", "gptneox", "gptj", "phi", "phi2"), _PARALLEL),
    **dict.fromkeys(("gpt2", "opt", "gptbigcode", "starcoder"), _LEARNED),
    **dict.fromkeys(("bloom", "mpt"), "positions by ALiBi, and layer norms with a mean"),
    **dict.fromkeys(("starcoder2", "stablelm", "olmo", "nemotron"), "layer norms with a mean"),
    "phi3": "one matrix for q, k and v, and sliding windows",
    **dict.fromkeys(("ministral", "ministral3"), "sliding windows or scaled queries"),
    **dict.fromkeys(("granite", "minicpm"), "scaled residuals, embeddings and logits"),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "rwkv6", "rwkv7"), "recurrent layers in place of attention"),
    **dict.fromkeys(("qwen2vl", "qwen25vl", "mllama", "llava", "mistral3", "pixtral", "idefics3"), _IMAGES),
}


def family_of(model_type: object, where: object) -> Family:
    """The family of a config's `model_type`; any other is a `UserError` that names what it needs."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(f"{where}: model_type is {model_type!r:.100}{_lacking(model_type)}; {_admitted(FAMILIES)}")


def check_gguf_architecture(architecture: object, where: object) -> str:
    """The `general.architecture` of a GGUF file if it can be imported, else a `UserError` as of `family_of`."""
    if isinstance(architecture, str) and architecture in GGUF_ARCHITECTURES:
        return architecture
    raise UserError(
        f"{where}: architecture is {architecture!r:.100}{_lacking(architecture)}; {_admitted(GGUF_ARCHITECTURES)}"
    )


def _lacking(name: object) -> str:
    part = _MISSING.get(name.replace("-", "").replace("_", "").lower()) if isinstance(name, str) else None
    return "" if part is None else f", which needs {part}"


def _admitted(names: Iterable[str]) -> str:
    return f"only {', '.join(names)} models can be imported"
