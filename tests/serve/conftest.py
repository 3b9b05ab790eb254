"""What the tests of serving share: a model that speaks bytes, and engines of one shape, compiled once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dvi_jax.checkpoint import Manifest
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.loading import LoadedModel, build_model
from dvi_jax.model.llama import random_base
from dvi_jax.model.speculative_llama import split
from dvi_jax.presets import TINY
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.learner import Learner
from tests.serve.traffic import SETTINGS, Collecting, requests, serve

SHAPE = {"slots": 4, "context": 96, "chunk": 16, "plan": "chain:2", "prefix_bytes": 0}


@pytest.fixture(scope="session")
def make_model(tokenizer_json):
    """make_model(...): random, one token a byte; a weak deep layer, so that drafts are right now and then."""

    def make(dtype="float32", drafter="kangaroo"):
        config = replace(TINY, vocab_size=258, num_layers=2, eos_token_ids=(1,))
        base = random_base(config, jax.random.key(0), jnp.dtype(dtype), std=0.3)
        layer = base["layers"]["1"]
        base["layers"]["1"] = {**layer, "out": layer["out"] * 0.1, "down": layer["down"] * 0.1}
        manifest = Manifest(
            source="random",
            source_sha256="",
            dtype=dtype,
            exit_layer=1,
            drafter=drafter,
            drafter_config={},
        )
        parts = split(build_model(config, manifest, base))
        return LoadedModel(config, manifest, *parts, Tokenizer(tokenizer_json, eos_token_ids=(1,)))

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def make_engine():
    """make_engine(model, ...): 4 slots of 96 tokens, chains of two drafts, no prefixes kept; to be closed.

    All keep learning signals, so that those tests that look at them need no programs of their own.
    """

    def make(model, **changes):
        return Engine(model, **SHAPE | {"on_window": lambda *_: None} | changes)

    return make


@pytest.fixture(scope="session")
def pieces_of():
    """pieces_of(handle): ids, text and finish reason of a whole reply."""

    def collect(handle):
        pieces = list(handle)
        ids = [token for piece in pieces for token in piece.ids]
        return ids, "".join(piece.text for piece in pieces), pieces[-1].finish_reason

    return collect


@pytest.fixture(scope="session")
def new_model(model, train_noise):
    """A drafter that is right now and then, and that learns as one from nothing does."""
    return replace(model.with_params(train_noise(model.params, "drafter", std=0.3)), drafter_is_trained=False)


@pytest.fixture(scope="session")
def some_ended(model, make_engine, pieces_of):
    """What a learner gets of six replies."""
    learner = Collecting()
    with make_engine(model, learner=learner) as engine:
        serve(engine, requests(), pieces_of)
    return learner.ended


@pytest.fixture
def make_learner(new_model):
    """make_learner(...): one whose records are kept in `records`."""

    def make(model=new_model, settings=SETTINGS, **options):
        records = []
        learner = Learner(
            model, settings, 96, report=lambda kind, step, values: records.append((kind, values)), **options
        )
        learner.records = records
        return learner

    return make
