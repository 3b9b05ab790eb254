"""From a checkpoint directory to a model ready to decode, and back to what a checkpoint stores of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dvi_jax.checkpoint import Checkpoint, Manifest, check_finite, check_shapes, read_token_ids, string_keys
from dvi_jax.config import KV, WHOLE_KV, LlamaConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.directories import cache_folder
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.mesh import check_blocks, collect, place_tree, shard_config, shards, spread, stored_shapes
from dvi_jax.model.drafters import Origin, build_drafter
from dvi_jax.model.equalised import keep_kv
from dvi_jax.model.llama import Llama
from dvi_jax.model.lora import inject_dual_lora
from dvi_jax.model.products import compute_capability
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, Tree, join, split
from dvi_jax.settings import require
from dvi_jax.trained_parts import with_drafter_from

FLOAT8_FROM = (8, 9)  # compute capability


@dataclass(frozen=True)
class LoadedModel:
    """A model on the device: static definition, arrays, and what is needed to speak to it."""

    config: LlamaConfig
    manifest: Manifest
    definition: Definition
    params: Params
    tokenizer: Tokenizer | None = None
    drafter_is_trained: bool = True  # False: its weights are random, or those of the head alone

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence."""
        return self.config.eos_token_ids

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the verifier that the drafter looks at."""
        return self.definition.drafting.taps

    @property
    def drafts_blocks(self) -> bool:
        """Whether the drafter makes all drafts of a round in one pass."""
        return self.definition.drafting.in_blocks

    @property
    def max_drafts(self) -> int | None:
        """The most drafts that the drafter makes in a round; None: as many as are asked for."""
        return self.definition.drafting.most

    @property
    def kv(self) -> str:
        """What its caches keep keys and values in (`config.KV`)."""
        return join(self.definition, self.params).llama.kv

    @cached_property
    def decode_params(self) -> Params:
        """`params` for decoding: all in the weights' dtype, so that a draft does not convert its drafter first.

        The base is as the checkpoint keeps it.
        """
        dtype = jnp.dtype(self.manifest.dtype)
        leaves, tree = jax.tree.flatten(self.params._replace(base={}))
        others = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype]
        # One call for all of them, after every update; the arrays that are right already are not touched.
        for i, leaf in zip(others, _cast([leaves[i] for i in others], dtype), strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(tree, leaves)._replace(base=self.params.base)

    def need_tokenizer(self, otherwise: str) -> Tokenizer:
        """The tokenizer; `UserError` that says `otherwise` where the checkpoint has none."""
        if self.tokenizer is None:
            raise UserError(otherwise)
        return self.tokenizer

    def with_kv(self, kv: str) -> LoadedModel:
        """The same model with caches that keep keys and values as `kv` says; `UserError` for none of `config.KV`.

        Once it was int8, rows of queries and keys stay multiplied (`equalised.py`). That changes nothing but float8,
        which is less near then: load anew for that.
        """
        check_kv(kv)
        module = join(self.definition, self.params)
        keep_kv(module.llama, kv, self.definition.mesh)
        definition, params = split(module, self.definition.mesh)
        return replace(self, definition=definition, params=params)

    def with_params(self, params: Params) -> LoadedModel:
        """The same model with other arrays, e.g. after learning."""
        return replace(self, params=params)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    weights: str | None = None,
    exit_layer: int | None = None,
    drafter_from: str | Path | None = None,
    any_drafter: bool = False,
    draft_vocabulary: str | Path | None = None,
    kv: str = WHOLE_KV,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a checkpoint, or what `importing.cache.open_checkpoint` makes one of, as `dtype` with `weights` then.

    `exit_layer` overrides the manifest's while the drafter is untrained. `seed` initialises what the checkpoint does
    not hold. `drafter_from`: a directory whose trained drafter to use, made for these weights unless `any_drafter`.
    `draft_vocabulary`: a JSON list of the only token ids to draft, in place of its own list. `kv`: what keys and values
    are kept in (`config.KV`). `mesh`: the devices that share it, each array of which goes to them as it is read.
    Raises `UserError` naming what does not fit.
    Compiled programs are kept on disk from here on, unless jax was told of a folder for them.
    """
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # jax declares its flags at run time
        enable_compilation_cache()
    checkpoint = open_checkpoint(path, dtype, weights, lazy=mesh is not None)
    if drafter_from is not None:
        checkpoint = with_drafter_from(checkpoint, drafter_from, any_model=any_drafter)
    model = from_checkpoint(checkpoint, exit_layer=exit_layer, kv=kv, seed=seed, mesh=mesh)
    return model if draft_vocabulary is None else with_draft_vocabulary(model, draft_vocabulary)


def with_draft_vocabulary(model: LoadedModel, path: str | Path) -> LoadedModel:
    """`model` drafting only the tokens of a JSON list (and the ones that end a sequence)."""
    ids = read_token_ids(Path(path))
    module = join(model.definition, model.params)
    module.restrict_drafts([*ids, *model.eos_ids])
    definition, params = split(module, model.definition.mesh)
    return replace(model, definition=definition, params=params)


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    exit_layer: int | None = None,
    kv: str = WHOLE_KV,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """The same from a `Checkpoint` in memory, or of which the base weights are still to be read (`stored_array.py`)."""
    if jax.dtypes.canonicalize_dtype(np.int64) != np.int32:
        raise UserError("JAX_ENABLE_X64 is set, and all counts and ids here have 32 bits: unset it")
    check_kv(kv)
    config, manifest = checkpoint.config, checkpoint.manifest
    if exit_layer is not None and exit_layer != manifest.exit_layer:
        if checkpoint.drafter is not None:
            raise UserError(f"the drafter was trained at exit layer {manifest.exit_layer}, not {exit_layer}")
        manifest = replace(manifest, exit_layer=exit_layer)
    tokenizer = None
    if checkpoint.tokenizer_json is not None:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens,"
                f" the model's embedding only {config.vocab_size}"
            )
    shard_config(config, mesh)  # what does not divide is said before anything is laid out
    check_blocks(mesh, checkpoint.base)
    # Nobody but the model has its arrays, so that those which are changed go one after the other.
    model = build_model(config, manifest, place_tree(mesh, config, checkpoint.base, "llama"), seed=seed, mesh=mesh)
    keep_kv(model.llama, kv, mesh)
    if checkpoint.draft_vocabulary is not None:
        model.restrict_drafts([*checkpoint.draft_vocabulary, *config.eos_token_ids])
    manifest = replace(manifest, drafter_config=model.drafter.config())
    definition, params = split(model, mesh)
    params = restore_trained(params, checkpoint.drafter, checkpoint.lora, str(checkpoint.path), config, mesh)
    is_trained = checkpoint.drafter is not None or "lora_s" in (checkpoint.lora or {})
    return LoadedModel(config, manifest, definition, params, tokenizer, is_trained)


def check_kv(kv: str) -> None:
    """Raise `UserError` for none of `config.KV`, and for one that this device's kernels cannot read."""
    require(kv in KV, "kv", kv, " or ".join(KV))
    capability = compute_capability()
    if kv == "float8" and capability and capability < FLOAT8_FROM:
        raise UserError(f"{jax.devices()[0].device_kind} has no eight-bit floats: keep keys and values as int8")


def build_model(
    config: LlamaConfig,
    manifest: Manifest,
    base: dict[str, Any],
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> SpeculativeLlama:
    """A `SpeculativeLlama` of the manifest's shape over `base`, with a fresh drafter and fresh LoRA sets.

    `base` as `mesh.place_tree` gives it.
    """
    drafter_key, lora_key = jax.random.split(jax.random.key(seed))
    origin = Origin(config, norm=base["norm"], key=drafter_key)
    drafter = build_drafter(manifest.drafter, manifest.drafter_config, origin)
    part = shard_config(config, mesh)
    llama = Llama(part, base, manifest.exit_layer, taps=drafter.taps, shards=shards(mesh))
    model = SpeculativeLlama(llama, drafter)
    if manifest.lora:
        inject_dual_lora(model, key=lora_key, **manifest.lora)
    if manifest.calibration:
        model.calibrate(manifest.calibration)
    return model


def restore_trained(
    params: Params, drafter: Tree | None, lora: Tree | None, where: str, config: LlamaConfig, mesh: Mesh | None = None
) -> Params:
    """`params` with the trained parts a checkpoint holds; every name and shape must match."""
    lora = lora or {}

    def fill(template: Tree, saved: Tree | None, part: str) -> Tree:
        if saved is None:
            return spread(mesh, template)
        check_shapes(string_keys(saved), string_keys(stored_shapes(mesh, config, template)), f"{where}/{part}")
        check_finite(saved, f"{where}/{part}")
        return place_tree(mesh, config, _like(template, saved))

    return params._replace(
        drafter=fill(params.drafter, {"drafter": drafter} if drafter else None, "drafter"),
        lora_s=fill(params.lora_s, lora.get("lora_s"), "lora/lora_s"),
        lora_d=fill(params.lora_d, lora.get("lora_d"), "lora/lora_d"),
    )


class TrainedParts(TypedDict):
    """What a checkpoint stores beside the base weights."""

    drafter: dict[str, Any] | None
    lora: dict[str, Any] | None


def trained_parts(params: Params) -> TrainedParts:
    """The `drafter` and `lora` trees a checkpoint stores (string keys), of a model on one device."""
    lora = {name: string_keys(getattr(params, name)) for name in ("lora_s", "lora_d") if getattr(params, name)}
    return {"drafter": string_keys(params.drafter.get("drafter")), "lora": lora or None}


def stored_parts(model: LoadedModel) -> TrainedParts:
    """The same on the host, of a model on any devices."""
    parts = ("drafter", "lora_s", "lora_d")
    mesh, params = model.definition.mesh, model.params
    collected = {name: collect(mesh, model.config, getattr(params, name)) for name in parts}
    return trained_parts(params._replace(**collected))


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next start decodes within seconds."""
    try:
        root = cache_folder()
    except UserError:  # a user without a home
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@partial(jax.jit, static_argnames="dtype")
def _cast(leaves: list[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
    return [leaf.astype(dtype) for leaf in leaves]


def _like(template: Any, saved: Any) -> Any:
    """`saved` in the structure and the dtypes of `template` (whose keys may be integers)."""
    if isinstance(template, dict):
        return {key: _like(value, saved[str(key)]) for key, value in template.items()}
    return np.asarray(saved).astype(template.dtype)
