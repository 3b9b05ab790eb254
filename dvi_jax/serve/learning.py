"""The device's side of learning while serving: windows kept, weights moved and compared, each by one program.

The host pays for every program and every read, all the more where other threads wait for Python meanwhile.
Letters: S positions of a slot, T of a window, F newest windows, M positions looked at.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dvi_jax.config import ObjectiveConfig, OptimizerConfig
from dvi_jax.learn.fast_update import (
    Batch,
    LearnerState,
    Trainable,
    evaluate_positions,
    fast_loss,
    fast_update,
    with_trainable,
)
from dvi_jax.learn.first_weights import NormalEquations, added, solved
from dvi_jax.learn.objectives import masked_mean
from dvi_jax.learn.optimizer import all_finite, counted
from dvi_jax.learn.replay import Replay, Windows, push
from dvi_jax.learn.schedule import kl_to_rl
from dvi_jax.loading import LoadedModel
from dvi_jax.model.features import Features
from dvi_jax.model.speculative_llama import Definition, Params, join
from dvi_jax.serve.ended import Ended
from dvi_jax.serve.places import written_into

Tree = TypeVar("Tree")

REPORTED = ("loss", "kl", "agreement", "grad_norm", "positions")  # metrics of an update that the host looks at


@partial(jax.jit, static_argnames=("window", "branches"), donate_argnames="replay")
def keep(replay: Replay, ended: Ended, *, window: int, branches: int) -> tuple[Replay, jax.Array]:
    """Put a reply's newest `window` positions into the replay; and how many of them are valid: int32 [].

    With so many drafts that were not taken. It is a few kernels: to record them anew, where what it is given or tells
    has moved (`places.py`), takes the host less than two further programs that keep these in their places.
    """
    replay = push(replay, newest_positions(ended.window(branches), window))
    return replay, replay.windows.length[replay.cursor - 1]


def newest_positions(windows: Windows, count: int) -> Windows:
    """One window, of S positions, cut to its newest `count`.

    What is cut off is missing as context, so the first positions after it are learned from a little less of it.
    """
    cut = jnp.maximum(windows.length[0] - count, 0)

    def newest_part(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, cut, count, axis=1) if leaf.ndim > 1 else leaf

    aside = windows.branches
    windows = jax.tree.map(newest_part, windows.replace(branches=None))
    return windows.replace(
        prompt_length=jnp.maximum(windows.prompt_length - cut, 0),
        length=jnp.minimum(windows.length, count),
        branches=aside and aside.replace(position=aside.position - cut),
    )


def drafts_told_apart(model: LoadedModel, steps: int) -> int:
    """How many drafts of a round, of so many, are learned each by itself; 1 where all are made alike, or as a block.

    Nothing is computed.
    """
    if model.drafts_blocks:
        return 1

    def unrolled(params: Params) -> list[jax.Array]:
        whole = join(model.definition, params)
        rows = Features.zeros((1, 2, model.config.hidden_size), len(model.taps), whole.llama.dtype)
        return whole.drafter.unroll(rows.final, rows, jnp.arange(2)[None], steps)

    return len(jax.eval_shape(unrolled, model.params))


def newest(replay: Replay, count: int) -> Windows:
    """The newest `count` windows, F of them; empty ones while there are fewer."""
    rows = (replay.cursor - 1 - jnp.arange(count)) % replay.windows.length.shape[0]
    return jax.tree.map(lambda ring: ring[rows], replay.windows)


@partial(
    jax.jit,
    static_argnames=("definition", "fresh", "objective", "optimizer", "size"),
    donate_argnames=("state", "report"),
)
def update(
    definition: Definition,
    params: Params,
    state: LearnerState,
    report: jax.Array,
    replay: Replay,
    rate: jax.Array,
    *,
    fresh: int,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    size: Batch,
) -> tuple[LearnerState, jax.Array]:
    """One fast update on the `fresh` newest windows and others of the replay -> the next state, and a report.

    Neither state has windows (`replay` is None). `state` is used up whole: the new one lies where it lay, so
    that what a GPU has recorded of other programs stays valid. The report, where `report` lay: float32 [1 + metrics],
    those of `REPORTED`, and how many updates in a row up to this one were not finite.
    """
    windows, before, state = newest(replay, fresh), state, state.replace(replay=replay)
    state, values = fast_update(
        definition,
        params,
        state,
        windows,
        jnp.array(False),
        objective=objective,
        optimizer=optimizer,
        size=size,
        rate=rate,
    )
    return jax.tree.map(_in_its_place, before, state.replace(replay=None)), _reported(report, values, state)


@partial(jax.jit, static_argnames="definition", donate_argnames="equations")
def add_newest(definition: Definition, params: Params, equations: NormalEquations, replay: Replay) -> NormalEquations:
    """`equations` with the rows of the newest window."""
    return added(definition, params, equations, newest(replay, 1))


@partial(jax.jit, static_argnames=("definition", "fresh", "objective", "count"), donate_argnames=("state", "report"))
def solve(
    definition: Definition,
    params: Params,
    state: LearnerState,
    report: jax.Array,
    equations: NormalEquations,
    replay: Replay,
    *,
    fresh: int,
    objective: ObjectiveConfig,
    count: int,
) -> tuple[LearnerState, jax.Array]:
    """In place of an update: first weights from all texts so far, and a report as of `update`.

    The report is of the new weights, at M positions of the `fresh` newest windows. Where they are not finite, the old
    ones stay, and it counts as an update that was not.
    """
    old = state.trainable["drafter"]
    found = solved(definition, with_trainable(params, state.trainable), equations)
    finite = all_finite(found)
    drafter = jax.tree.map(lambda new, old: jnp.where(finite, new, old), found, old)
    new = state.replace(trainable=state.trainable | {"drafter": drafter}, step=state.step + 1)
    new = new.replace(optimizer=counted(state.optimizer, finite))
    windows = newest(replay, fresh).replace(branches=None)
    model, nothing = join(definition, with_trainable(params, new.trainable)), jnp.zeros(windows.length.shape, bool)
    picked = evaluate_positions(model, windows, nothing, state.key, objective, count)
    _, values = fast_loss(picked, state.baseline, kl_to_rl(state.step, objective), objective)
    values |= {"grad_norm": jnp.float32(0)}
    return jax.tree.map(_in_its_place, state, new), _reported(report, values, new)


def _reported(place: jax.Array, values: dict[str, jax.Array], state: LearnerState) -> jax.Array:
    found = [*(values[name] for name in REPORTED), state.optimizer.notfinite_count]
    return written_into(place, jnp.stack([number.astype(jnp.float32) for number in found]))


def _in_its_place(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new`, a number also where `old` was not read; a key, which always is, as it comes."""
    return new if new.ndim or jnp.issubdtype(new.dtype, jax.dtypes.prng_key) else written_into(old, new)


@partial(jax.jit, static_argnames=("definition", "fresh", "objective", "count"))
def compare(
    definition: Definition,
    params: Params,
    good: Trainable,
    live: Trainable,
    replay: Replay,
    key: jax.Array,
    *,
    fresh: int,
    objective: ObjectiveConfig,
    count: int,
) -> jax.Array:
    """How often the first choices of two drafters are the verifier's, at M random positions of the `fresh` newest.

    -> float32 [3]: the share of drafts for good, for live, and the standard error of their difference.
    """
    windows = newest(replay, fresh).replace(branches=None)  # as in decoding, where nothing behind a wrong draft counts

    def right(trainable: Trainable) -> tuple[jax.Array, jax.Array]:
        model, nothing = join(definition, with_trainable(params, trainable)), jnp.zeros(windows.length.shape, bool)
        picked = evaluate_positions(model, windows, nothing, key, objective, count)
        top = jnp.argmax(picked.verifier_logits, axis=-1)
        drafts = jnp.stack([jnp.argmax(logits, axis=-1) == top for logits in picked.draft_logits])
        return jnp.mean(drafts.astype(jnp.float32), axis=0), picked.valid

    (of_good, valid), (of_live, _) = right(good), right(live)
    difference = of_good - of_live
    spread = masked_mean(jnp.square(difference - masked_mean(difference, valid)), valid)
    error = jnp.sqrt(spread / jnp.maximum(jnp.sum(valid), 1))
    return jnp.stack([masked_mean(of_good, valid), masked_mean(of_live, valid), error])


@jax.jit
def copied(tree: Tree) -> Tree:
    """The same in arrays of its own, which an update of the original leaves alone."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A uint32 that tells weights apart: any bit of any leaf changes it. Against accidents, not against intent."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).ravel()
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # odd factors lose no bit
        total = total * jnp.uint32(2654435761) + jnp.sum(bits.astype(jnp.uint32) * odd, dtype=jnp.uint32)
    return total
