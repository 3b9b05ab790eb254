"""Bit-exact losslessness with drafts of every accept length: speculative rounds against plain ones of the same program.

    python -m experiments.lossless --shape 7b --dtype bfloat16
    python -m experiments.lossless --shape 7b --weights int4
    python -m experiments.lossless --shape 7b --layers 4 --mesh model=2
    python -m experiments.lossless --shape smollm2 --draft-steps --trees 8 --batch 32
    python -m experiments.lossless --shape smollm2 --draft-steps 3 --trees 8 --batch 32 --temperature 0.8 --top-p 0.9

The drafter proposes the plain continuation with some tokens replaced, so every accept length occurs. Compared are the
token ids and every bit of the verifier's final hidden state (whose head gives the logits) at every position. With a
`--temperature` tokens are drawn, each sequence with a seed of its own, drafts with the verifier's noise. With
`--mesh` both go on there from one device's caches, and it is told, but not asked for, whether plain rounds have that
device's bits too (docs/scaling.md says where they do). The model has to fit on one device twice.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import Mesh, NamedSharding

from dvi_jax.config import KV, WHOLE_KV, DecodeConfig, MeshConfig, SamplingConfig
from dvi_jax.decode.batch import make_sampling, start
from dvi_jax.decode.kernel_loading import load_kernels
from dvi_jax.decode.plan import PLAIN, Plan, drafts_of, plan_for
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import STATE_SPECS, DecodeState, Knobs
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, build_model, enable_compilation_cache
from dvi_jax.mesh import check_batch, make_mesh, place_tree, shard_config, specs_for
from dvi_jax.model.eight_bits import widened
from dvi_jax.model.speculative_llama import join, split
from dvi_jax.presets import SHAPES
from dvi_jax.quantisation import BFLOAT16, WEIGHTS, chosen_storage
from experiments.measure import environment, random_model, random_weights, settings_of, write_result
from experiments.scripted import Scripted


def main() -> int:
    """Run the check; exit status 1 if anything differs."""
    parser = ArgumentParser(prog="python -m experiments.lossless", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, metavar="L", help="fewer than the shape has")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", choices=WEIGHTS, default=BFLOAT16, help="what matrices are kept in")
    parser.add_argument("--draft-steps", type=int, nargs="*", default=[1, 3, 5], help="of chains")
    parser.add_argument("--trees", type=int, nargs="*", default=[], metavar="ROWS", help="trees of so many rows, too")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv", choices=KV, default=WHOLE_KV, help="what keys and values are kept in")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 takes the best token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--mesh", default="data=1,model=1", metavar="MESH", help="where the drafts are verified")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", metavar="FILE.json")
    options = parser.parse_args()
    if options.top_p < 1 and not options.temperature:
        raise UserError("--top-p needs a --temperature above 0")
    drawn = SamplingConfig(options.temperature, top_p=options.top_p)
    enable_compilation_cache()
    config = SHAPES[options.shape]
    config = replace(config, num_layers=options.layers or config.num_layers)
    _, how = chosen_storage(options.weights, None)
    model = random_model(config, options.dtype, 2, quantisation=how).with_kv(options.kv)
    mesh = make_mesh(MeshConfig.parse(options.mesh))
    check_batch(mesh, options.batch, "--batch")
    verifying = scripted(model if mesh is None else on_mesh(model, mesh))
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.config.vocab_size, (options.batch, options.prompt)).tolist()
    plans = [plan_for(steps, drafts_blocks=False) for steps in options.draft_steps]
    plans += [Plan("tree", size) for size in options.trees]
    rows = [check(model, verifying, prompts, plan, drawn, options.new_tokens, rng) for plan in plans]
    for row in rows:
        print(row)
    converted = conversions_are_exact() if jax.default_backend() == "gpu" else None
    if converted is not None:
        print(f"all values of eight bits become bfloat16 exactly: {converted}")
    if options.out:
        result = {"environment": environment(), "settings": settings_of(options), "rows": rows, "converted": converted}
        write_result(Path(options.out), result)
    return 0 if all(row["equal"] for row in rows) and converted is not False else 1


def scripted(model: LoadedModel) -> LoadedModel:
    """`model` with the drafter that follows a script."""
    module = join(model.definition, model.params)
    module.drafter = Scripted(model.config)
    return LoadedModel(model.config, model.manifest, *split(module, model.definition.mesh))


def on_mesh(model: LoadedModel, mesh: Mesh) -> LoadedModel:
    """The same random weights on several devices."""
    config, manifest = model.config, model.manifest
    shard_config(config, mesh)  # what does not divide is said in one line
    base = place_tree(mesh, config, jax.tree.map(np.asarray, random_weights(config, manifest)), "llama")
    whole = LoadedModel(config, manifest, *split(build_model(config, manifest, base, mesh=mesh), mesh))
    return whole.with_kv(model.kv)


def check(
    model: LoadedModel,
    verifying: LoadedModel,
    prompts: list[list[int]],
    plan: Plan,
    drawn: SamplingConfig,
    new_tokens: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Plain against scripted drafts with about one wrong token in four, and against all right ones."""
    settings = DecodeConfig(draft_steps=drafts_of(plan), max_new_tokens=new_tokens)
    sampling = make_sampling(model, prompts, drawn if drawn.temperature else None)
    began = start(model, prompts, settings, Knobs.make(0, 0.0, ()), sampling=sampling, record=True)
    without = plan if plan.is_plains_program else PLAIN
    plain = go_on(verifying, began.replace(drafter=jnp.zeros_like(began.tokens)), without, 0)
    tokens = np.asarray(plain.tokens)
    wrong = rng.random(tokens.shape) < 0.25
    scripts = {"mixed": np.where(wrong, (tokens + 1) % model.config.vocab_size, tokens), "right": tokens}
    lengths: Counter[int] = Counter()
    equal = True
    for script in scripts.values():
        fast = go_on(verifying, began.replace(drafter=jnp.asarray(script)), plan, plan.drafts)
        accepted = np.asarray(fast.accept_lengths)
        lengths.update(accepted[accepted > 0].tolist())
        equal &= same(plain, fast)
    elsewhere = (
        {} if verifying.definition.mesh is None else {"as_one_device": same(go_on(model, began, without, 0), plain)}
    )
    made = [row[len(prompt) : end] for row, prompt, end in zip(tokens, prompts, np.asarray(plain.length), strict=True)]
    return {
        "plan": str(plan),
        "equal": equal,
        **elsewhere,
        "accept_lengths": dict(sorted(lengths.items())),
        "positions": int(np.sum(plain.length)) - sum(map(len, prompts)),
        "distinct_tokens": len(np.unique(np.concatenate(made))),
    }


def conversions_are_exact() -> bool:
    """On a GPU: whether kernels make of all bytes, as integers and as floats but NaN, what JAX does elsewhere.

    Where they do not, plain decoding and speculation would be wrong alike.
    """

    def kernel(x: Any, out: Any) -> None:
        out[...] = widened(x[...], jnp.bfloat16, inline=True)

    def holds(kind: Any) -> bool:
        bits = jnp.tile(jnp.arange(256, dtype=jnp.uint8), 16).reshape(64, 64)
        values = jax.lax.bitcast_convert_type(bits, kind)
        shape = jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)
        found = pl.pallas_call(kernel, out_shape=shape, compiler_params=plt.CompilerParams())(values)
        expected = np.asarray(values.astype(jnp.bfloat16))
        known = ~np.isnan(expected.astype(np.float32))
        return np.array_equal(np.asarray(found).view(np.uint16)[known], expected.view(np.uint16)[known])

    return holds(jnp.int8) and holds(jnp.float8_e4m3fn)


def go_on(model: LoadedModel, began: DecodeState, plan: Plan, drafts: int) -> DecodeState:
    """One generation from a copy of its beginning; its signals have every verifier hidden state."""
    mesh, knobs = model.definition.mesh, Knobs.make(drafts, 0.0, ())
    state = jax.tree.map(jnp.copy, began)
    if mesh is not None:
        specs = specs_for(STATE_SPECS, state)
        state = jax.device_put(state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    load_kernels(model, state, knobs, plan)
    return jax.block_until_ready(decode_rounds(model.definition, model.decode_params, state, knobs, plan))


def same(plain: DecodeState, fast: DecodeState) -> bool:
    """Equal ids, and equal bits of the hidden state behind every committed token."""
    lengths = np.asarray(plain.length)
    if not np.array_equal(lengths, fast.length):
        return False
    pairs = zip(
        (np.asarray(plain.tokens), final_bits(plain)),
        (np.asarray(fast.tokens), final_bits(fast)),
        strict=True,
    )
    return all(np.array_equal(a[row, :length], b[row, :length]) for a, b in pairs for row, length in enumerate(lengths))


def final_bits(state: DecodeState) -> np.ndarray:
    """The raw bits of the verifier's final hidden states, which `go_on` keeps."""
    assert state.signals is not None
    x = state.signals.features.final
    return np.asarray(jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]))


if __name__ == "__main__":
    sys.exit(run_cli(main))
