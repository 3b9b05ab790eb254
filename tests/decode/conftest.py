"""What the tests of decoding share: models whose drafts are often right, and one batch of rows, run to its end."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.config import DecodeConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.batch import make_sampling, read_generations, start
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import Knobs
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import TINY
from tests.compiling import lightly_compiled

RECITED = "aé b€c😀defghij"  # no byte occurs twice


@pytest.fixture(scope="session")
def make_close(make_tiny):
    """make_close(dtype): a weak deep layer, so that the untrained drafter is right now and then, sampled or not."""

    def make(dtype="float32"):
        model = make_tiny(dtype, layers=2)
        llama = model.params.base["llama"]
        layers = {
            index: layer | {"out": layer["out"] * 0.1, "down": layer["down"] * 0.1} if index else layer
            for index, layer in llama["layers"].items()
        }
        return model.with_params(model.params._replace(base={"llama": llama | {"layers": layers}}))

    return make


@pytest.fixture(scope="session")
def run_rows():
    """run_rows(model, prompts, settings, ...): generations of three prompts of at most 9 tokens, one program for all.

    settings: of sampling, None is greedy. budgets: new tokens of each row, at least 2. `knobs`: of `Knobs.make`.
    """

    def run(model, prompts, settings=None, *, budgets=(30, 30, 30), **knobs):
        knobs = Knobs.make(**{"draft_steps": 3, "threshold": 0.0, "eos_ids": ()} | knobs)
        sampling = make_sampling(model, prompts, settings)
        decoding = DecodeConfig(draft_steps=3, max_new_tokens=30)
        with lightly_compiled():  # whatever follows begins with this program
            state = start(model, prompts, decoding, knobs, sampling=sampling, longest_prompt=9)
        lengths = [len(prompt) for prompt in prompts]
        state = state.replace(limit=jnp.array(lengths, jnp.int32) + jnp.array(budgets, jnp.int32))
        state = decode_rounds(model.definition, model.decode_params, state, knobs)
        return read_generations(state, lengths, tuple(knobs.eos_ids.tolist()))

    return run


@pytest.fixture(scope="session")
def reciter(tokenizer_json):
    """A byte-level model that goes on with RECITED wherever it is in it, ends it with its eos (1), and starts again.

    Its layers add nothing and each row of its head is what comes before that token, so its drafts are right and sure.
    """
    tokenizer = Tokenizer(tokenizer_json, eos_token_ids=(1,))
    config = replace(TINY, vocab_size=258, num_layers=2, max_position_embeddings=128, eos_token_ids=(1,))
    base = random_base(config, jax.random.key(0), std=1.0)
    silent = {
        name: {**layer, "out": 0 * layer["out"], "down": 0 * layer["down"]} for name, layer in base["layers"].items()
    }
    cycle = jnp.array([*tokenizer.encode(RECITED), 1])
    embed = base["embed"] / jnp.linalg.norm(base["embed"], axis=-1, keepdims=True)
    head = jnp.zeros_like(embed).at[jnp.roll(cycle, -1)].set(8 * embed[cycle])
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype="float32",
        exit_layer=1,
        drafter="exit_head",
        drafter_config={"rank": 2, "alpha": 2.0},
    )
    model = build_model(config, manifest, {**base, "layers": silent, "embed": embed, "head": head})
    return LoadedModel(config, manifest, *split(model), tokenizer)


@pytest.fixture(scope="session")
def mumbler(reciter):
    """The same model with a drafter that is sure, and never right."""
    scale = {"drafter": reciter.params.drafter["drafter"] | {"scale": jnp.float32(-20)}}
    return reciter.with_params(reciter.params._replace(drafter=scale))


@pytest.fixture(scope="session")
def five_tokens():
    """Models of five tokens with their exact distributions (distributions.py, which imports more than others need)."""
    from tests.decode.distributions import FiveTokens

    return FiveTokens()
