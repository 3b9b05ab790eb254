"""Whether a plan's program gives the bits of plain decoding's, on this device and with this release of jax.

Two programs of one row class (`plan.py`) should. A compiler or a device that orders a sum otherwise would break that
without a sign, so it is looked at once, on the model itself: keys and values of every layer hold all that the rows
below them came to, and the tokens what came of the last layer.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import choose_plan, make_knobs, start
from dvi_jax.decode.kept import kept_path
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import DecodeState, Knobs
from dvi_jax.errors import UserError
from dvi_jax.loading import LoadedModel

ROUNDS = 8  # of the plan that are compared
PROMPT_TOKENS = 16


def check_agreement(model: LoadedModel, settings: DecodeConfig) -> None:
    """Raise `UserError` where the settings' plan has other bits than plain decoding; what agreed is kept on disk."""
    plan = choose_plan(model, settings)
    if plan.is_plains_program:
        return
    # Of several processes one might know and another not, and only together can they look.
    kept = agreed_path(model, settings.width, str(plan)) if jax.process_count() == 1 else None
    if kept is not None and kept.exists():
        return
    prompt = [token % model.config.vocab_size for token in range(3, 3 + PROMPT_TOKENS)]
    if len(prompt) + settings.max_new_tokens > model.config.context_length:
        return  # and decoding will say so
    require_equal_bits(model, start(model, [prompt], settings, make_knobs(settings, ())), plan)
    keep_agreed(kept)


def require_equal_bits(model: LoadedModel, state: DecodeState, plan: Plan) -> None:
    """Raise `UserError` unless rounds by `plan` and plain ones lead from `state`, just prefilled, to equal bits.

    Every sequence is compared as far as it came, and goes on from another token than its neighbours: a batch of one
    prompt would show the same sums again and again.
    """
    state = state.replace(tokens=told_apart(state, model.config.vocab_size))
    drafted = _decoded(model, state, plan, plan.drafts, ROUNDS)
    plain = _decoded(model, state, PLAIN, 0, int(jnp.max(drafted.length - state.length)))
    if not _agree(drafted, plain):
        raise refusal(plan)


@partial(jax.jit, static_argnames="vocab_size")
def told_apart(state: DecodeState, vocab_size: int) -> jax.Array:
    """Tokens int32 [B, S] of `state` with a pending one of its own in each sequence, whatever was predicted."""
    batch, room = state.tokens.shape
    pending = (3 + jnp.arange(batch, dtype=jnp.int32)) % vocab_size
    return jnp.where(jnp.arange(room) == state.length[:, None] - 1, pending[:, None], state.tokens)


def refusal(plan: Plan) -> UserError:
    """What is said of a plan whose bits are others."""
    device, version = jax.devices()[0].device_kind, jax.__version__
    return UserError(
        f"plan {plan}: with jax {version} on {device} its rounds do not have the bits of plain decoding, so that"
        " replies could differ; decode with --plan plain, and please report it"
    )


def agreed_path(model: LoadedModel, *shape: object) -> Path | None:
    """Where it is kept that programs of such a shape agree; None for a user without a home."""
    return kept_path("agreement", model, *shape)


def keep_agreed(path: Path | None) -> None:
    """Keep that they agree, if that is possible: else it is looked at again."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def _decoded(model: LoadedModel, state: DecodeState, plan: Plan, drafts: int, rounds: int) -> DecodeState:
    """After so many rounds; `state` is left as it is."""
    copied = jax.tree.map(jnp.copy, state.replace(done=jnp.zeros_like(state.done)))
    knobs = Knobs.make(drafts, 0.0, (), until=rounds)
    return decode_rounds(model.definition, model.decode_params, copied, knobs, plan)


@jax.jit
def _agree(left: DecodeState, right: DecodeState) -> jax.Array:
    """Whether all that both committed is equal in every sequence; the caches lack the last token of each."""
    committed = jnp.minimum(left.length, right.length)[:, None]  # [B, 1]

    def equal(a: jax.Array, b: jax.Array) -> jax.Array:  # [B, K, S, ...]
        filled = jnp.arange(a.shape[2]) < committed - 1
        return jnp.all((_bits(a) == _bits(b)) | ~filled.reshape(-1, 1, a.shape[2], *[1] * (a.ndim - 3)))

    caches = jax.tree.map(equal, (left.shallow, left.deep), (right.shallow, right.deep))
    is_token = jnp.arange(left.tokens.shape[1]) < committed
    same = jnp.all((left.tokens == right.tokens) | ~is_token)
    return jnp.all(jnp.stack([same, *jax.tree.leaves(caches)]))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
