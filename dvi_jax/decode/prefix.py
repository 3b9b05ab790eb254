"""Prefixes: what many prompts begin with (a system prompt) is taken in once and laid under every batch.

A prompt's rows behind the prefix attend to its cached rows, so they agree with those of a prefill of the whole prompt
to rounding, not bit for bit; plain and speculative output start from the same state and stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.decode.prefill import PREFIX_SPECS, Filled, bucket, fill
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import WHOLE
from dvi_jax.model.speculative_llama import Definition, Params, join


@dataclass(frozen=True)
class Prefix:
    """Token ids and all that the model made of them; good for as long as the model's arrays stay as they are."""

    ids: tuple[int, ...]
    filled: Filled  # batch 1, as many slots as the bucket of `ids`


def make_prefix(model: LoadedModel, ids: Sequence[int]) -> Prefix:
    """Take in `ids`. Raises `UserError` where there are none, or some the model does not know."""
    config = model.config
    if not 1 <= len(ids) < config.context_length:
        raise UserError(f"a prefix has 1 to {config.context_length - 1} tokens, got {len(ids)}")
    if not all(0 <= token < config.vocab_size for token in ids):
        raise UserError(f"prefix ids must be between 0 and {config.vocab_size - 1}")
    tokens = _pad([ids])
    length = jnp.array([len(ids)], jnp.int32)
    return Prefix(tuple(ids), fill_prefix(model.definition, model.decode_params, tokens, length))


@partial(jax.jit, static_argnames="definition")
def fill_prefix(definition: Definition, params: Params, tokens: jax.Array, length: jax.Array) -> Filled:
    """Tokens int32 [1, T], padded to a bucket, of `length` [1]. The padding's slots are overwritten later."""

    def whole(params: Params, tokens: jax.Array, length: jax.Array) -> Filled:
        model = join(definition, params)
        filled = fill(model, Filled.empty(model, *tokens.shape, keep=True), tokens, length, fresh=True)
        return filled._replace(position=length[0], frontier=filled.features)

    return definition.sharded(whole, params, (WHOLE, WHOLE), PREFIX_SPECS)(params, tokens, length)


def pad_prompts(prompts: Sequence[Sequence[int]], prefix: Prefix | None = None) -> tuple[jax.Array, jax.Array]:
    """What `prefill` takes in: tokens behind the prefix, int32 [B, T], padded to a bucket, and whole lengths [B].

    Raises `UserError` for a prompt that does not begin with the prefix.
    """
    shared = () if prefix is None else prefix.ids
    for index, prompt in enumerate(prompts):
        if tuple(prompt[: len(shared)]) != shared:
            raise UserError(f"prompt {index} does not begin with the {len(shared)} tokens of the shared prefix")
    lengths = jax.device_put(np.array([len(prompt) for prompt in prompts], np.int32))
    return _pad([prompt[len(shared) :] for prompt in prompts]), lengths


def _pad(rows: Sequence[Sequence[int]]) -> jax.Array:
    """Rows of token ids -> int32 [B, T], zeros behind each."""
    padded = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return jax.device_put(padded)
