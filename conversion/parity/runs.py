"""The implementations that parity compares, behind one interface.

Each gives the stage tensors of a prompt (float32 numpy, [T, V] or [T, D]) and decodes a prompt greedily, all in float32
on the CPU or, for JAX, its default device.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import torch

from conversion.parity.inputs import Case
from dvi_jax.config import DecodeConfig, LlamaConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.prefill import bucket
from dvi_jax.loading import load
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, join
from kangaroo_ref import kangaroo_generate, load_kangaroo, prompt_stages
from kangaroo_ref.upstream import TRANSFORMERS_VERSION, Upstream, load_upstream

STAGES = {
    "logits": "logits",
    "hidden_exit": "exit hidden",
    "hidden_last": "final hidden",
    "adapter_out": "adapter output",
    "adapter_logits": "draft logits",
}
Stages = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How every implementation decodes; `eos_id` -1 is none."""

    draft_steps: int = 6
    threshold: float = 0.6
    max_new_tokens: int = 64
    eos_id: int = -1


@dataclass(frozen=True)
class Decoded:
    """A decoded prompt. The lists hold one number per round, the prefill being none; None where there are no such."""

    output_ids: list[int]
    accept_lengths: list[int] | None = None
    drafted: list[int] | None = None


class Implementation(Protocol):
    """`same_end`: it stops where the reference stops; the others decode to exactly `max_new_tokens`."""

    @property
    def name(self) -> str: ...

    @property
    def same_end(self) -> bool: ...

    def stages(self, prompt: Sequence[int]) -> Stages:
        """The tensors it has, by their key in `STAGES`."""
        ...

    def decode(self, prompt: Sequence[int], settings: Settings) -> Decoded:
        """Greedy ids and rounds."""
        ...


class Reference:
    """`kangaroo_ref`, what the others are compared with."""

    name, same_end = "kangaroo_ref", True

    def __init__(self, case: Case):
        self.model = load_kangaroo(case.hf, case.adapter, case.exit_layer)

    def stages(self, prompt: Sequence[int]) -> Stages:
        return {name: tensor.numpy() for name, tensor in prompt_stages(self.model, prompt).items()}

    def decode(self, prompt: Sequence[int], settings: Settings) -> Decoded:
        done = kangaroo_generate(self.model, prompt, **_decode_options(prompt, settings))
        return Decoded(done.output_ids, done.accept_lengths[1:], done.drafted)

    def margin(self, prefix: Sequence[int]) -> float:
        """How far apart the two best logits after `prefix` are: what rounding would have to bridge."""
        best = prompt_stages(self.model, prefix)["logits"][-1].topk(2).values
        return (best[0] - best[1]).item()


class Jax:
    """This package, from the case's checkpoint."""

    name, same_end = "jax", False

    def __init__(self, case: Case):
        self.model = load(case.checkpoint)

    def stages(self, prompt: Sequence[int]) -> Stages:
        # Padded to a bucket on the right, where causality hides it: prompts of many lengths share a compilation.
        padded = np.zeros((1, bucket(len(prompt))), np.int32)
        padded[0, : len(prompt)] = prompt
        stages = jax.device_get(_jax_stages(self.model.definition, self.model.params, jnp.asarray(padded)))
        return {name: array[0, : len(prompt)] for name, array in stages.items()}

    def decode(self, prompt: Sequence[int], settings: Settings) -> Decoded:
        config = DecodeConfig(
            draft_steps=settings.draft_steps, threshold=settings.threshold, max_new_tokens=settings.max_new_tokens
        )
        eos_ids = () if settings.eos_id < 0 else (settings.eos_id,)
        (done,), _ = generate_batch(self.model, [prompt], config, eos_ids=eos_ids)
        return Decoded(done.output_ids, done.accept_lengths, done.drafted)


@partial(jax.jit, static_argnames="definition")
def _jax_stages(definition: Definition, params: Params, prompt: jax.Array) -> dict[str, jax.Array]:
    model = join(definition, params)
    positions = jnp.arange(prompt.shape[1])[None]
    hidden_exit, _, _ = model.llama.shallow(prompt, None, positions)
    hidden_last, _, _ = model.llama.deep(hidden_exit, None, positions)
    adapter_out = model.drafter.unroll(hidden_exit, Features(hidden_last), positions, 1)[0]
    return {
        "logits": model.llama.logits(hidden_last),
        "hidden_exit": hidden_exit,
        "hidden_last": hidden_last,
        "adapter_out": adapter_out,
        "adapter_logits": model.drafter.logits(adapter_out, model.llama.head_weight()),
    }


class HuggingFace:
    """transformers' own Llama: no adapter and no rounds, one row through all layers per token."""

    name, same_end = "hf", False

    def __init__(self, case: Case):
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.exit_layer = case.exit_layer
        self.model = LlamaForCausalLM.from_pretrained(case.hf, torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def stages(self, prompt: Sequence[int]) -> Stages:
        output = self.model(torch.tensor([list(prompt)]), output_hidden_states=True)
        hidden_exit, hidden_last = output.hidden_states[self.exit_layer], output.hidden_states[-1]
        tensors = {"logits": output.logits, "hidden_exit": hidden_exit, "hidden_last": hidden_last}
        return {name: tensor[0].numpy() for name, tensor in tensors.items()}

    @torch.no_grad()
    def decode(self, prompt: Sequence[int], settings: Settings) -> Decoded:
        ids, rows, past = list(prompt), torch.tensor([list(prompt)]), None
        for step in range(settings.max_new_tokens):
            output = self.model(rows, past_key_values=past, use_cache=True)
            rows, past = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
            ids.append(rows.item())
            if step > 0 and ids[-1] == settings.eos_id:  # the original never checks the first new token
                break
        return Decoded(ids)


@dataclass(frozen=True)
class Original:
    """An untouched upstream checkout."""

    upstream: Upstream
    name = "upstream"
    same_end = True

    def stages(self, prompt: Sequence[int]) -> Stages:
        return {name: tensor.numpy() for name, tensor in self.upstream.stages(prompt).items()}

    def decode(self, prompt: Sequence[int], settings: Settings) -> Decoded:
        ids, accept_lengths = self.upstream.generate(prompt, **_decode_options(prompt, settings))
        return Decoded(ids, accept_lengths[1:])


@contextmanager
def open_upstream(case: Case, kangaroo_dir: Path) -> Iterator[Original]:
    """Upstream on the case's weights; `UserError` for a checkout that was altered."""
    with load_upstream(kangaroo_dir, case.hf, case.adapter, case.exit_layer) as upstream:
        yield Original(upstream)


def why_not_transformers(config: LlamaConfig) -> str | None:
    """Why transformers cannot run this model here, or None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers {TRANSFORMERS_VERSION} is not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 4.33.3 registers its outputs under torch's old names
        import transformers.modeling_outputs
    if transformers.__version__ != TRANSFORMERS_VERSION:
        return f"found transformers {transformers.__version__}, parity is defined with {TRANSFORMERS_VERSION}"
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        return f"transformers {TRANSFORMERS_VERSION} has no llama3 rotary scaling"
    if config.head_dim * config.num_heads != config.hidden_size:
        return f"transformers {TRANSFORMERS_VERSION} has no heads of another size than hidden_size / num_heads"
    return None


class _DecodeOptions(TypedDict):
    draft_steps: int
    threshold: float
    max_new_tokens: int
    eos_id: int
    max_length: int


def _decode_options(prompt: Sequence[int], settings: Settings) -> _DecodeOptions:
    # The original's buffer of 2048 positions must not end a run that the model's context allows.
    length = len(prompt) + settings.max_new_tokens
    return {
        "draft_steps": settings.draft_steps,
        "threshold": settings.threshold,
        "max_new_tokens": settings.max_new_tokens,
        "eos_id": settings.eos_id,
        "max_length": max(2048, length),
    }
