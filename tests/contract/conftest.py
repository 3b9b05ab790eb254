"""What a contract test gets: a model with the case's drafter, trained a little so that its drafts are often right."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.checkpoint import Checkpoint, Manifest
from dvi_jax.config import DistillConfig, LlamaConfig, MeshConfig
from dvi_jax.importing.rounding import rounded
from dvi_jax.learn.distill import distill_step, init_distill
from dvi_jax.loading import LoadedModel, build_model, from_checkpoint, stored_parts
from dvi_jax.mesh import make_mesh
from dvi_jax.model import drafters
from dvi_jax.model.llama import random_base
from dvi_jax.model.quantised import Quantised
from dvi_jax.model.speculative_llama import Params, Tree, join, split
from dvi_jax.presets import TINY
from dvi_jax.quantisation import Quantisation
from tests.compiling import lightly_compiled
from tests.contract.cases import PROMPTS, Case, along, everything, star
from tests.contract.probe import PROBES

TAPPING = ("block", *(probe.kind for probe in PROBES))
STEPS, ROWS, LENGTH = 40, 8, 36
UNROLLED = 2  # drafts of a round that are learned from: each one more is compiled apart
# As small as a round of three drafts allows: what learns is compiled with every layer and draft of its own.
OPTIONS = {"block": {"layers": 1, "block": 3, "markov_rank": 8}, "medusa": {"heads": 3}}
TWO_LAYERS, THREE_LAYERS = (replace(TINY, num_layers=count) for count in (2, 3))  # every layer is compiled apart


@pytest.fixture(scope="session", autouse=True)
def probes():
    """The drafters of `probe.py` count as the package's own."""
    with pytest.MonkeyPatch.context() as patch:
        for probe in PROBES:
            patch.setitem(drafters.DRAFTERS, probe.kind, probe)
        yield


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        cases = everything() if full else star()
        marker = metafunc.definition.get_closest_marker("axes")
        if marker is not None:
            cases = along(cases, marker.kwargs.get("full", marker.args) if full else marker.args)
        metafunc.parametrize("case", cases, ids=str)


def verifier_of(drafter: str) -> LlamaConfig:
    """As few layers as the drafter can look at."""
    return THREE_LAYERS if drafter in TAPPING else TWO_LAYERS


def untrained(case: Case, config: LlamaConfig | None = None) -> LoadedModel:
    """A verifier whose deep layers say little, so that what is drafted from lower down can be learned quickly.

    `config`: of which shape; that of `verifier_of` where it isn't given.
    """
    kept_apart = {name: getattr(case, name) for name in ("drafter", "dtype", "exit", "trunk", "weights")}
    return _untrained(replace(Case(), **kept_apart), config or verifier_of(case.drafter)).with_kv(case.kv)


@cache
def _untrained(case: Case, config: LlamaConfig) -> LoadedModel:
    with lightly_compiled():
        base = random_base(config, jax.random.key(0), jnp.dtype(case.dtype), std=0.3)
        base["layers"] = {
            i: layer | {"out": layer["out"] * 0.1, "down": layer["down"] * 0.1} if int(i) else layer
            for i, layer in base["layers"].items()
        }
    block = issubclass(drafters.DRAFTERS[case.drafter], drafters.BlockDrafter)
    manifest = Manifest(
        source="random",
        source_sha256="",
        dtype=case.dtype,
        exit_layer=0 if block or case.exit == "none" else 1,
        drafter=case.drafter,
        drafter_config=OPTIONS.get(case.drafter, {}),
        lora={"rank_s": 2, "rank_d": 0} if case.trunk == "separate" else {},
    )
    with lightly_compiled():
        return LoadedModel(config, manifest, *split(build_model(config, manifest, kept(base, case.weights))))


def kept(base: Tree, weights: str) -> Tree:
    """A base tree with the matrices of its layers in the format `weights`."""
    if weights == "whole":
        return base
    how = Quantisation(weights=weights)
    layers = {
        i: {
            name: rounded(np.asarray(array, np.float32), how).parts() if how.includes((name,)) else array
            for name, array in layer.items()
        }
        for i, layer in base["layers"].items()
    }
    return base | {"layers": jax.tree.map(jnp.asarray, layers)}


@cache
def own_text(config: LlamaConfig) -> np.ndarray:
    """Greedy continuations by the verifier, of `PROMPTS` and of random tokens: int32 [ROWS, LENGTH]."""
    model = untrained(Case(), config)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=False):
        row[: len(prompt)] = prompt
    given = np.array([len(prompt) for prompt in PROMPTS] + [3] * (ROWS - len(PROMPTS)))

    @jax.jit
    def continued(tokens):
        llama = join(model.definition, model.params).llama
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

        def step(t, tokens):
            final = llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)[0]
            following = jnp.argmax(llama.logits(final), axis=-1)[:, t].astype(jnp.int32)
            return tokens.at[:, t + 1].set(jnp.where(t + 1 < given, tokens[:, t + 1], following))

        return jax.lax.fori_loop(0, LENGTH - 1, step, tokens)

    with lightly_compiled():
        return np.asarray(continued(tokens))


@cache
def trained(drafter: str, dtype: str, trunk: str) -> tuple[LoadedModel, list[float]]:
    """The model after a short distillation on its own text, and the loss of every step."""
    model = untrained(Case(drafter=drafter, dtype=dtype, trunk=trunk))
    config = DistillConfig(
        checkpoint="c", out="o", data=(), drafter=drafter, tokens=STEPS * ROWS * LENGTH, row_length=LENGTH,
        batch_rows=ROWS, unroll_steps=UNROLLED, warmup=1, lr=2e-2,
    )  # fmt: skip
    tokens, losses = own_text(model.config), []
    with lightly_compiled():
        state = init_distill(model.params, config)
        for _ in range(STEPS):
            state, metrics = distill_step(
                model.definition, model.params, state, tokens, np.ones_like(tokens, bool), config=config
            )
            losses.append(float(metrics["loss"]))
    return model.with_params(model.params._replace(**state.trainable)), losses


def overlaid(under: Tree, over: Tree) -> Tree:
    """The tree `under` with the leaves that `over` has."""
    return {
        name: over.get(name, below) if not isinstance(below, dict) else overlaid(below, over.get(name, {}))
        for name, below in under.items()
    }


@pytest.fixture
def case_model(case: Case, train_noise: Callable[..., Params]) -> LoadedModel:
    """The case's model, its drafter trained beside a verifier in float32; a separate trunk, for which it was not
    trained, is moved a little.
    """
    parts, model = trained(case.drafter, "float32", "shared")[0].params, untrained(case)
    params = model.params._replace(drafter=parts.drafter)
    if case.trunk == "separate":
        params = train_noise(params, "lora_s", std=0.02)
    if parts.lora_s:
        params = params._replace(lora_s=overlaid(params.lora_s, parts.lora_s))
    model = model.with_params(params)
    vocabulary = None if case.vocabulary == "whole" else tuple(range(0, TINY.vocab_size, 2))
    if case.mesh:
        return over_mesh(model, case.mesh, vocabulary)
    if vocabulary is None:
        return model
    module = join(model.definition, model.params)
    module.restrict_drafts(vocabulary)
    definition, params = split(module)
    return replace(model, definition=definition, params=params)


def over_mesh(model: LoadedModel, mesh: str, vocabulary: tuple[int, ...] | None) -> LoadedModel:
    """The same model on the devices of a mesh, drafting from `vocabulary` alone."""
    parts = stored_parts(model)
    options = join(model.definition, model.params).drafter.config()
    checkpoint = Checkpoint(
        Path("contract"),
        model.config,
        replace(model.manifest, drafter_config=options),
        base_of(model),
        **jax.device_get(parts),
        draft_vocabulary=vocabulary,
    )
    with lightly_compiled():
        return from_checkpoint(checkpoint, kv=model.kv, mesh=make_mesh(MeshConfig.parse(mesh)))


def base_of(model: LoadedModel) -> Tree:
    """The base tree that a checkpoint of the model has, on the host."""
    base, llama = model.params.base["llama"], join(model.definition, model.params).llama

    def of_layer(index: int, names: Iterable[str]) -> Tree:
        weights = {name: getattr(llama.layers[index], name)[...] for name in names if name != "lora"}
        return {name: w.parts() if isinstance(w, Quantised) else w for name, w in weights.items()}

    layers = {str(i): of_layer(i, names) for i, names in base["layers"].items()}
    return jax.device_get({"embed": base["embed"], "norm": base["norm"], "head": base["head"], "layers": layers})


@pytest.fixture
def losses(case: Case) -> list[float]:
    return trained(case.drafter, case.dtype, case.trunk)[1]
