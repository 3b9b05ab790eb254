"""The device's side of an engine: sequences in a fixed number of slots, and the programs that change them.

Prompts are taken in and laid into slots (`prompts.py`), and decoded with whatever is in the other slots
(`run_stretch`). Every program has one shape whatever the requests are, and no row of a pass depends on the rows beside
it: a reply depends on its request and on the engine's shape, and on nothing else.

Letters, also of `prompts.py`: B slots, P prompts that are taken in together, S positions in the caches, C tokens of a
chunk, W most tokens that a round commits, E room for end-of-sequence ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import SamplingConfig
from dvi_jax.decode.batch import MOST_EOS_IDS
from dvi_jax.decode.plan import Plan
from dvi_jax.decode.prefill import Filled, begin, choose_first
from dvi_jax.decode.sampling import Sampling
from dvi_jax.decode.speculative import decode_rounds, speculative_round
from dvi_jax.decode.state import NO_TOKEN, STATE_SPECS, DecodeState, Knobs, knob_specs
from dvi_jax.mesh import ROWS, WHOLE, replicas
from dvi_jax.model.speculative_llama import Definition, Params, SpeculativeLlama, join
from dvi_jax.serve.places import written_into

MOST_ROUNDS = 16  # of a stretch
TERM_COLUMNS = 8 + MOST_EOS_IDS  # of `Terms.packed`


class Slots(NamedTuple):
    """Every slot's sequence. A free slot's is done: it is computed and nothing comes of it."""

    decode: DecodeState  # sampling is always there, so that slots may change between greedy and sampled requests
    eos_ids: jax.Array  # int32 [B, E], NO_TOKEN where unused
    # What programs tell the host, where it lay before (`places.py`).
    told: jax.Array  # int32 [B, columns], the `Outcome` of the last `run_stretch`, packed
    first: jax.Array  # int32 [P, 2], of the prompts that were laid last: the first token, and whether it was all


SLOT_SPECS = Slots(STATE_SPECS, ROWS, WHOLE, WHOLE)  # type: ignore[arg-type]  # where they lie on a mesh


class Terms(NamedTuple):
    """How prompts are to be continued: arrays of one row each, NumPy's on the host, of a single row from `of`."""

    length: Any  # int32 [P], tokens of the prompt
    limit: Any  # int32 [P], prompt and reply
    eos_ids: Any  # int32 [P, E], NO_TOKEN where unused
    seed: Any  # uint32 [P]
    temperature: Any  # float32 [P], 0 is greedy
    top_k: Any  # int32 [P], V for all
    top_p: Any  # float32 [P]
    min_p: Any  # float32 [P]
    penalty: Any  # float32 [P], repetition penalty

    @classmethod
    def of(
        cls, length: int, new_tokens: int, eos_ids: tuple[int, ...], sampling: SamplingConfig, vocab_size: int
    ) -> Terms:
        """Of a prompt of `length` tokens; `sampling` is coupled."""
        padded = (*eos_ids, *[NO_TOKEN] * (MOST_EOS_IDS - len(eos_ids)))
        return cls(
            np.array([length], np.int32),
            np.array([length + new_tokens], np.int32),
            np.array([padded], np.int32),
            np.array([sampling.seed], np.uint32),
            np.array([sampling.temperature], np.float32),
            np.array([min(sampling.top_k or vocab_size, vocab_size)], np.int32),
            np.array([sampling.top_p], np.float32),
            np.array([sampling.min_p], np.float32),
            np.array([sampling.repetition_penalty], np.float32),
        )

    @classmethod
    def joined(cls, rows: Sequence[Terms]) -> Terms:
        """Of several prompts."""
        return cls(*map(np.concatenate, zip(*rows, strict=True)))

    def packed(self) -> np.ndarray:
        """All in one array int32 [P, TERM_COLUMNS], which costs one copy to the device."""
        return np.column_stack([field.view(np.int32) for field in self])

    @classmethod
    def unpacked(cls, packed: jax.Array) -> Terms:
        """From `packed`, on the device."""
        columns = jnp.split(packed, [1, 2, 2 + MOST_EOS_IDS, *range(3 + MOST_EOS_IDS, packed.shape[1])], axis=1)
        length, limit, eos_ids, seed, temperature, top_k, top_p, min_p, penalty = columns

        def of(column: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
            return jax.lax.bitcast_convert_type(column[:, 0], dtype)

        return cls(
            length=of(length, jnp.int32),
            limit=of(limit, jnp.int32),
            eos_ids=eos_ids,
            seed=of(seed, jnp.uint32),
            temperature=of(temperature, jnp.float32),
            top_k=of(top_k, jnp.int32),
            top_p=of(top_p, jnp.float32),
            min_p=of(min_p, jnp.float32),
            penalty=of(penalty, jnp.float32),
        )

    def sampling(self, tokens: jax.Array, vocab_size: int) -> Sampling:
        """The same for `decode/sampling.py`, behind the prompts in tokens int32 [P, S]."""
        batch, positions = tokens.shape
        prompts = jnp.where(jnp.arange(positions) < self.length[:, None], tokens, vocab_size)
        return Sampling(
            key=jax.vmap(jax.random.key)(jnp.asarray(self.seed)),
            temperature=jnp.asarray(self.temperature),
            top_k=jnp.asarray(self.top_k),
            top_p=jnp.asarray(self.top_p),
            min_p=jnp.asarray(self.min_p),
            penalty=jnp.asarray(self.penalty),
            seen=jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], prompts].set(True, mode="drop"),
            coupled=True,
        )


class Outcome(NamedTuple):
    """What a stretch did to every slot, on the host."""

    start: np.ndarray  # int32 [B], position of the first column of `tokens`
    length: np.ndarray  # int32 [B], tokens that the sequence has now, its prompt included
    done: np.ndarray  # bool [B]
    accept_lengths: np.ndarray  # int32 [B, rounds], tokens committed in each round, 0 once a sequence is done
    drafted: np.ndarray  # int32 [B, rounds]
    tokens: np.ndarray  # int32 [B, T], what was committed, and what stood there before

    @classmethod
    def read(cls, packed: jax.Array | np.ndarray) -> Outcome:
        """From `Slots.told`, once the device has it."""
        found = np.asarray(packed)
        rounds, counts = int(found[0, 0]), found[:, 4 : 4 + 2 * MOST_ROUNDS]
        return cls(
            start=found[:, 1],
            length=found[:, 2],
            done=found[:, 3].astype(bool),
            accept_lengths=counts[:, :rounds],
            drafted=counts[:, MOST_ROUNDS : MOST_ROUNDS + rounds],
            tokens=found[:, 4 + 2 * MOST_ROUNDS :],
        )

    @classmethod
    def of_pieces(cls, pieces: Sequence[Outcome]) -> Outcome:
        """Of a stretch that was run in pieces, in their order."""
        if len(pieces) == 1:  # most have one
            return pieces[0]
        first, last, columns = pieces[0], pieces[-1], pieces[0].tokens.shape[1]
        tokens = np.zeros((len(first.start), len(pieces) * columns), np.int32)
        for piece in pieces:  # each begins where the one before it ended, or before that: those tokens are the same
            where = (piece.start - first.start)[:, None] + np.arange(columns)
            np.put_along_axis(tokens, where, piece.tokens, axis=1)
        return cls(
            start=first.start,
            length=last.length,
            done=last.done,
            accept_lengths=np.concatenate([piece.accept_lengths for piece in pieces], axis=1),
            drafted=np.concatenate([piece.drafted for piece in pieces], axis=1),
            tokens=tokens,
        )


class Shape(NamedTuple):
    """What an engine's programs are compiled for, besides the model."""

    slots: int  # B
    room: int  # S
    width: int  # W
    record: bool  # whether slots keep learning signals
    branches: int = 0  # drafts not taken of a position that slots keep beside them, at most
    together: int = 1  # P


def abstract_slots(definition: Definition, params: Params, shape: Shape) -> Slots:
    """Shapes and types of all slots; nothing is computed."""
    return jax.eval_shape(definition.sharded(partial(_begun, definition, shape), params, (), SLOT_SPECS), params)


@partial(jax.jit, static_argnames=("definition", "shape"))
def empty_slots(definition: Definition, params: Params, shape: Shape) -> Slots:
    """All slots free."""

    def make(params: Params) -> Slots:
        slots = jax.tree.map(_zeros, jax.eval_shape(partial(_begun, definition, shape), params))
        # Rounds look at a sequence's last two tokens, so there must be two.
        ones = jnp.ones_like(slots.decode.length)
        committed = slots.decode.committed.replace(count=ones)
        state = slots.decode.replace(length=2 * ones, limit=2 * ones, done=ones.astype(bool), committed=committed)
        return slots._replace(decode=state)

    return definition.sharded(make, params, (), SLOT_SPECS)(params)


def _begun(definition: Definition, shape: Shape, params: Params) -> Slots:
    """This device's slots, each with a prompt of one token, to see what they are made of."""
    model, count = join(definition, params), shape.slots // replicas(definition.mesh)
    one = Terms.of(1, 1, (), SamplingConfig(), model.llama.config.vocab_size)
    terms = jax.tree.map(lambda field: jnp.broadcast_to(field, (count, *field.shape[1:])), one)
    filled = Filled.empty(model, count, shape.room, keep=shape.record)
    (state, eos_ids), first_token = begin_slots(model, filled, terms, shape.width, shape.branches, sampled=True)
    told = jnp.zeros((shape.slots, _pack(state, state.length).shape[1]), jnp.int32)
    return Slots(state, eos_ids, told, jnp.zeros((shape.together, 2), first_token.dtype))


def release(slots: Slots, ended: jax.Array | np.ndarray) -> Slots:
    """The sequences marked in bool [B] go no further."""
    # No more than the program needs: the host pays for every array that one is given.
    return slots._replace(decode=slots.decode.replace(done=_marked(slots.decode.done, ended)))


_marked = jax.jit(jnp.logical_or, donate_argnums=0)


@partial(jax.jit, static_argnames=("definition", "plan", "sampled", "piece"), donate_argnames="slots")
def run_stretch(
    definition: Definition,
    params: Params,
    slots: Slots,
    rounds: jax.Array | None,
    plan: Plan,
    *,
    sampled: bool,
    piece: int = 0,
) -> Slots:
    """At most so many rounds, fewer if every sequence is done before, and what became of them in `Slots.told`.

    Not `sampled` is a program without noise or sorting, for times when every sequence is greedy, without a repetition
    penalty. To such ones it gives the tokens that the other gives. With a `piece`, `rounds` is None: so many, in a loop
    of known length, which a GPU is given at once; of another XLA reads the condition on the host.
    """
    began, sampling = slots.decode.length, slots.decode.sampling
    knobs = Knobs.make(plan.drafts, 0.0, ())._replace(eos_ids=slots.eos_ids)
    none_yet = written_into(slots.decode.rounds, jnp.int32(0))
    state = slots.decode.replace(rounds=none_yet, sampling=sampling if sampled else None)
    if rounds is None:
        state = _piece(definition, params, state, knobs, plan, piece)
    else:
        state = decode_rounds(definition, params, state, knobs._replace(until=rounds), plan)
    told = written_into(slots.told, definition.on_all(_pack(state, began)))
    return slots._replace(decode=state.replace(sampling=state.sampling if sampled else sampling), told=told)


def calls_of(rounds: int, piece: int) -> list[np.int32 | None]:
    """What `run_stretch` is to be given as `rounds`, one call after the other, for a stretch of so many or more."""
    return [None] * -(-rounds // piece) if piece else [np.int32(rounds)]


def _piece(
    definition: Definition, params: Params, state: DecodeState, knobs: Knobs, plan: Plan, rounds: int
) -> DecodeState:
    """So many rounds, of which those behind the end of a sequence do nothing to it."""

    def decode(params: Params, state: DecodeState, knobs: Knobs) -> DecodeState:
        model = join(definition, params)
        return jax.lax.fori_loop(0, rounds, lambda _, s: speculative_round(model, s, knobs, plan), state)

    return definition.sharded(decode, params, (STATE_SPECS, knob_specs(knobs)), STATE_SPECS)(params, state, knobs)


def _pack(state: DecodeState, began: jax.Array) -> jax.Array:
    """What the host wants to know of a stretch that began at lengths [B], in one array: `Outcome` unpacks it."""
    columns = columns_of(state)
    start = jnp.minimum(began, state.tokens.shape[1] - columns)
    tokens = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, columns))(state.tokens, start)
    numbers = jnp.stack([jnp.broadcast_to(state.rounds, start.shape), start, state.length, state.done], axis=1)
    return jnp.concatenate([numbers, state.accept_lengths, state.drafted, tokens], axis=1)


@partial(jax.jit, static_argnames=("definition", "most"))
def token_logprobs(
    definition: Definition, params: Params, slots: Slots, slot: jax.Array, start: jax.Array, *, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the verifier gave a slot's tokens, where learning signals are kept: T positions from `start` on.

    -> log-probabilities float32 [T] (natural logarithm, temperature 1), and of the `most` best tokens: float32
    [T, most], best first, and the tokens int32 [T, most]. T is what a stretch may commit.
    """
    state = slots.decode
    assert state.signals is not None

    def of(buffer: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(buffer, slot, 1)[0]
        return jax.lax.dynamic_slice_in_dim(row, start, columns_of(state))

    def log_probs(params: Params, features: jax.Array) -> jax.Array:
        llama = join(definition, params).llama
        return jax.nn.log_softmax(llama.all_logits(llama.logits(features)), axis=-1)

    features, tokens = of(state.signals.features.final), of(state.tokens)
    log_p = definition.sharded(log_probs, params, (WHOLE,), WHOLE)(params, features)
    best, alternatives = jax.lax.top_k(log_p, most)
    own = jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
    return definition.on_all((own, best, alternatives))


def columns_of(state: DecodeState) -> int:
    """Tokens of a sequence that are read after a stretch: as many as it may have committed, if there is room."""
    return min(MOST_ROUNDS * state.committed.hidden.shape[1], state.tokens.shape[1])


def begin_slots(
    model: SpeculativeLlama, filled: Filled, terms: Terms, width: int, branches: int, *, sampled: bool
) -> tuple[tuple[DecodeState, jax.Array], jax.Array]:
    """Sequences before their first round and their `eos_ids`, as in `Slots`, and their first tokens int32 [P]."""
    sampling = terms.sampling(filled.tokens, model.llama.config.vocab_size)
    first_token = choose_first(model, filled, sampling if sampled else None, jnp.asarray(terms.length))
    length, limit = jnp.asarray(terms.length), jnp.asarray(terms.limit)
    state = begin(filled, first_token, length, limit, jnp.asarray(terms.eos_ids), width, sampling, branches)
    counts = jnp.zeros((len(length), MOST_ROUNDS), jnp.int32)  # of one stretch alone
    return (state.replace(accept_lengths=counts, drafted=counts), jnp.asarray(terms.eos_ids)), first_token


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.vmap(jax.random.key)(jnp.zeros(leaf.shape, jnp.uint32))
    return jnp.zeros(leaf.shape, leaf.dtype)
