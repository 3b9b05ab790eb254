"""Whether a plan's stretches have the bits of plain ones in this engine's slots: looked at before the engine serves.

As `decode/agreement.py` does it for generations, with programs of the engine's own shape. Slots may fill the memory, so
none is copied: they hold the same prompt twice, go on by the plan and plainly, and their checksums are compared.
Behind the prompt each slot goes on from another token: sums in another order round to the same number more often than
not, so many different ones are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import SamplingConfig
from dvi_jax.decode.agreement import agreed_path, keep_agreed, refusal, told_apart
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import to_host
from dvi_jax.serve.compiling import compile_stretches
from dvi_jax.serve.intake import Intake
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.slots import MOST_ROUNDS, Outcome, Slots, Terms, calls_of, release, run_stretch

PROMPT_TOKENS = 16


def check_plans(model: LoadedModel, pieces: Mapping[Plan, int], programs: Programs, intake: Intake) -> None:
    """Raise `UserError` where one of the plans has other bits than plain decoding in the slots, all free.

    They are free afterwards. What agreed is kept on disk. `pieces`: of each plan, as `run_stretch` has them; 0: none.
    """
    slots = programs.slots
    shape = slots.decode.tokens.shape, slots.decode.committed.hidden.shape[1], slots.decode.signals is not None
    plain = pieces.get(PLAIN, min(pieces.values()))
    kept = {
        plan: agreed_path(model, shape, intake.rows, piece, plain, str(plan))
        for plan, piece in pieces.items()
        if plan.drafts
    }
    if jax.process_count() > 1:  # one might know and another not, and only together can they look
        kept = dict.fromkeys(kept)
    unknown = {plan: path for plan, path in kept.items() if path is None or not path.exists()}
    if not unknown:
        return
    compared = [(PLAIN, plain, False), *((plan, pieces[plan], False) for plan in unknown)]
    compile_stretches(model.definition, model.decode_params, slots, compared)
    plainly = _run(model, programs, intake, PLAIN, plain)
    for plan, path in unknown.items():
        drafted = _run(model, programs, intake, plan, pieces[plan])
        if not _agree(drafted, plainly):
            raise refusal(plan)
        keep_agreed(path)


def _run(
    model: LoadedModel, programs: Programs, intake: Intake, plan: Plan, piece: int
) -> tuple[np.ndarray, np.ndarray]:
    """A stretch in which every slot goes on from the same prompt, and another token behind it.

    -> positions committed int32 [B]; checksums uint32 [B, positions] from the first new one on.
    """
    definition, params, vocab_size = model.definition, model.decode_params, model.config.vocab_size
    batch, room = programs.slots.decode.tokens.shape
    prompt = [token % vocab_size for token in range(3, 3 + min(PROMPT_TOKENS, intake.chunk))]
    width, greedy = programs.slots.decode.committed.hidden.shape[1], SamplingConfig(temperature=0.0)
    terms = Terms.of(len(prompt), room - width - len(prompt), (), greedy, vocab_size)
    rows = Terms.joined([terms] * intake.rows).packed()
    intake.fill(prompt)
    for begin in range(0, batch, intake.rows):
        places = np.arange(begin, begin + intake.rows, dtype=np.int32)  # those beyond the last are none
        intake.lay(places, rows, sampled=False)
    slots = programs.slots
    slots = slots._replace(decode=slots.decode.replace(tokens=told_apart(slots.decode, vocab_size)))
    for limit in calls_of(MOST_ROUNDS, piece):
        slots = run_stretch(definition, params, slots, limit, plan, sampled=False, piece=piece)
    checksums = _checksums(slots, np.int32(len(prompt)), MOST_ROUNDS * width)
    found = Outcome.read(slots.told).length - len(prompt), to_host(checksums)
    programs.slots = release(slots, np.ones(batch, bool))
    return found


def _agree(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    """Whether all that both committed is equal, in every slot; the caches lack the last token of each."""
    committed = np.minimum(left[0], right[0]) - 1
    compared = np.arange(left[1].shape[1]) < committed[:, None]
    return bool(np.all((left[1] == right[1]) | ~compared))


@partial(jax.jit, static_argnames="count")
def _checksums(slots: Slots, start: jax.Array, count: int) -> jax.Array:
    """Of the bits of each position from `start` on, its token and all keys and values: uint32 [B, count].

    A difference in one number changes the sum: each is weighted oddly, modulo 2^32.
    """
    state = slots.decode
    count = min(count, state.tokens.shape[1])
    rows = [jax.lax.dynamic_slice_in_dim(state.tokens, start, count, 1).astype(jnp.uint32)]
    for buffer in jax.tree.leaves((state.shallow, state.deep)):
        cut = jax.lax.dynamic_slice_in_dim(buffer, start, count, 2)  # [B, K, count, H]
        bits = jax.lax.bitcast_convert_type(cut, jnp.dtype(f"uint{8 * cut.dtype.itemsize}")).astype(jnp.uint32)
        weights = 2 * jnp.arange(cut.shape[1] * cut.shape[3], dtype=jnp.uint32).reshape(cut.shape[1], 1, -1) + 1
        rows.append(jnp.sum(bits * weights, axis=(1, 3), dtype=jnp.uint32))
    weights = 2 * jnp.arange(len(rows), dtype=jnp.uint32) + 1
    return jnp.sum(jnp.stack(rows, axis=-1) * weights, axis=-1, dtype=jnp.uint32)
