"""Trees: which nodes are chosen, against an enumeration of all, and what is accepted, wherever the right path lies."""

from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import make_knobs, start
from dvi_jax.decode.plan import PLAIN, Growth, Plan
from dvi_jax.decode.selection import at_places, ranks, repeated_argmax
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import NO_TOKEN, Knobs
from dvi_jax.decode.tree import grow
from dvi_jax.decode.tree_round import right_path
from dvi_jax.model.drafters import StepDrafter
from dvi_jax.model.speculative_llama import SpeculativeLlama, join, split
from tests.compiling import lightly_compiled

pytestmark = pytest.mark.optimized
VOCAB, LEVELS, ROWS = 4, 3, 12
TABLE = np.random.default_rng(0).normal(scale=1.5, size=(2, LEVELS, VOCAB, VOCAB))  # logits by sequence, level, token


def grown(rows=ROWS, growth=None, table=TABLE, **knobs):
    """A tree of each sequence, whose drafts depend on their number and the token before: pending are tokens 1 and 2."""
    tokens = jnp.array([[3, 1, 0, 0], [2, 0, 0, 0]])
    zeros = jnp.zeros((2, 4), jnp.int32)
    state = SimpleNamespace(
        tokens=tokens,
        length=jnp.array([2, 1]),
        limit=jnp.array([100, 100]),
        done=jnp.array([False, False]),
        accept_lengths=zeros,
        drafted=zeros,
        sampling=None,
    )
    model = SimpleNamespace(draft_token=lambda index: index, draft_shards=1, calibrated=lambda logits, level: logits)
    settings = {"draft_steps": LEVELS, "threshold": 0.0, "eos_ids": (), **knobs}

    def expand(level, frontier):
        before = frontier.tokens[..., -1]
        return jax.vmap(lambda rows, at: rows[at])(jnp.asarray(table[:, level], jnp.float32), before)

    growth = growth or Growth(LEVELS, VOCAB**LEVELS, VOCAB)
    tree = jax.jit(lambda knobs: grow(model, state, knobs, rows, growth, expand))(Knobs.make(**settings))
    return jax.tree.map(np.asarray, tree)


def by_enumeration(sequence, pending, table=TABLE):
    """The probability of every path of 1 .. LEVELS tokens behind `pending`."""
    probabilities = np.exp(table) / np.exp(table).sum(axis=-1, keepdims=True)
    found = {}
    for length in range(1, LEVELS + 1):
        for path in product(range(VOCAB), repeat=length):
            before = (pending, *path)
            steps = [probabilities[sequence, i, before[i], before[i + 1]] for i in range(length)]
            found[path] = float(np.prod(steps))
    return found


def paths_of(tree, sequence):
    """The tokens of each row's path, by its `path`, by its `parent` and by `tokens_before`: all must agree."""
    before = np.asarray(tree.tokens_before())[sequence]
    for row in range(tree.tokens.shape[1]):
        if not np.asarray(tree.is_draft)[sequence, row]:
            continue
        along, at = [], row
        while at:
            assert tree.parent[sequence, at] < at
            along.insert(0, int(tree.tokens[sequence, at]))
            at = tree.parent[sequence, at]
        depth = tree.depth[sequence, row]
        assert len(along) == depth
        assert before[row, 1 : depth + 1].tolist() == along
        assert (before[row, depth + 1 :] == NO_TOKEN).all()
        rows = tree.path[sequence, row]
        assert tree.tokens[sequence, rows[: depth + 1]].tolist() == before[row, : depth + 1].tolist()
        assert (rows[depth:] == row).all()
        yield tuple(along)


def test_the_most_probable_nodes_become_rows():
    tree = grown()
    for sequence, pending in enumerate((1, 2)):
        everything = by_enumeration(sequence, pending)
        best = sorted(everything, key=everything.__getitem__, reverse=True)[: ROWS - 1]
        assert set(paths_of(tree, sequence)) == set(best)
        assert tree.tokens[sequence, 0] == pending
    assert len(set(map(int, tree.depth[0]))) == LEVELS + 1  # a tree of every depth, and one that branches
    assert len({int(p) for p in tree.parent[0]}) > 2


def test_a_beam_drafts_from_the_best_of_a_level_alone():
    tree = grown(rows=9, growth=Growth(2, 2, 4))
    for sequence, pending in enumerate((1, 2)):
        everything = by_enumeration(sequence, pending)
        first = sorted((p for p in everything if len(p) == 1), key=everything.__getitem__, reverse=True)[:2]
        seen = [*first, *(p for p in everything if len(p) == 2 and p[:1] in first)]
        assert set(paths_of(tree, sequence)) == set(sorted(seen, key=everything.__getitem__, reverse=True)[:8])
        sources = sorted(int(s) for s in tree.source[sequence] if s >= 0)
        assert sources == [0, 1, 2]


def test_few_levels_may_have_fewer_nodes_than_rows():
    """Those behind are empty: two nodes and four children of each are ten drafts, for sixteen rows."""
    tree = grown(rows=16, growth=Growth(2, 2, VOCAB))
    assert tree.tokens.shape == (2, 16)
    assert tree.is_draft.sum(axis=1).tolist() == [10, 10]
    for indices in (tree.path, tree.parent):
        assert indices.min() >= 0
        assert indices.max() <= 10
    for sequence in range(2):
        assert len(set(paths_of(tree, sequence))) == 10


def test_children_are_in_the_order_of_their_places():
    tree = grown()
    children = np.asarray(tree.children(VOCAB))
    for sequence in range(2):
        for row in range(ROWS):
            own = [r for r in range(1, ROWS) if tree.parent[sequence, r] == row]
            own.sort(key=lambda r: tree.place[sequence, r])
            expected = [int(tree.tokens[sequence, r]) for r in own]
            assert children[sequence, row, : len(own)].tolist() == expected
            assert (children[sequence, row, len(own) :] == NO_TOKEN).all()


@pytest.mark.parametrize(
    ("knobs", "longest"), [({"draft_steps": 2}, 2), ({"draft_steps": 0}, 0), ({"draft_cost": 1.0}, 1)]
)
def test_bounds_of_a_chain_bound_a_tree(knobs, longest):
    """`draft_cost` 1: a draft costs a round, so none but the first pays."""
    tree = grown(**knobs)
    assert np.asarray(tree.reached).tolist() == [longest] * 2
    assert ((tree.tokens >= 0) == (np.arange(ROWS) == 0) | tree.is_draft).all()


def test_a_node_below_the_threshold_has_no_children():
    everything, sure = by_enumeration(0, 1), 0.4
    for path in paths_of(grown(threshold=sure), 0):
        for end in range(1, len(path)):
            step = everything[path[:end]] / (everything[path[: end - 1]] if end > 1 else 1)
            assert step >= sure


def test_no_drafter_makes_a_path_that_is_none():
    """Where it gives no numbers behind one node, others are told wrong parents: they are right for no verifier."""
    table = TABLE.copy()
    table[:, 0], table[:, 1] = [0.3, 0.2, 0.1, 0.0], 0.0
    table[:, 1, 0], table[:, 1, 3] = np.nan, [5.0, 0.0, 0.0, 0.0]
    tree, rng = grown(rows=36, growth=Growth(3, 4, 4), table=table), np.random.default_rng(0)
    assert (tree.parent == np.arange(36))[:, 1:].any()  # its own parent
    lengths = set()
    for _ in range(100):
        verified = rng.integers(0, VOCAB, tree.tokens.shape)
        for sequence, path in enumerate(np.asarray(right_path(tree, verified))):
            drafts = tree.depth[sequence, path[-1]]
            rows, before = path[1 : drafts + 1], path[:drafts]
            assert path[0] == 0
            np.testing.assert_array_equal(tree.parent[sequence, rows], before)
            np.testing.assert_array_equal(tree.tokens[sequence, rows], verified[sequence, before])
            lengths.add(int(drafts))
    assert lengths >= {1, 2}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_selection_is_that_of_a_stable_sort(count):
    """Ties too, and entries that are not to be taken."""
    x = np.random.default_rng(count).integers(0, 4, (3, 2, 40)).astype(np.float32)
    x[0, 0, :35] = -np.inf
    order = np.argsort(-x, axis=-1, kind="stable")[..., :count]
    values, index = repeated_argmax(jnp.asarray(x), count)
    if count <= 5:  # -inf marks what was taken: it is met again where nothing else is left
        np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))
    np.testing.assert_array_equal(at_places(ranks(jnp.asarray(x)), count), order)


# Rounds of a model whose drafter is told what to propose.

PLACES = (
    0,
    0,
    0,
    4,
    2,
    0,
    4,
    3,
    4,
    1,
    0,
    0,
    1,
    4,
)  # of the right token among its siblings, position by position; 4: it is not there
NEW, WIDTH, PROMPTS = 60, 16, [[7, 40, 3], [9, 2, 2, 8, 11]]


class Placed(StepDrafter):
    """Knows the text, and puts the right token of a position at its place; wherever it strays, it drafts nonsense."""

    kind = "placed"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def init_state(self, batch, slots, dtype):
        return jnp.zeros((batch, slots), jnp.int32)

    def first(self, state, committed, hidden, position):
        return self._propose(state, hidden, position[:, None]), state

    def next(self, state, draft_hidden, hidden, positions):
        return self._propose(state, hidden, positions), state

    def logits(self, draft_hidden, head):
        right, place = (draft_hidden[..., i : i + 1].astype(jnp.int32) for i in range(2))
        token = jnp.arange(self.vocab_size)
        # Places of wrong tokens are 0, 1, .. behind the right one in the vocabulary, without its own.
        behind = (token - right - 1) % self.vocab_size
        places = jnp.where(token == right, place, jnp.where(behind < place, behind, behind + 1))
        return 10.0 - 0.5 * places.astype(jnp.float32)

    def _propose(self, script, hidden, positions):
        right = jnp.take_along_axis(script, positions + 1, axis=1)
        place = jnp.array(PLACES)[(positions + 1) % len(PLACES)]
        both = jnp.stack([right, place], axis=-1).astype(hidden.dtype)
        return jnp.zeros_like(hidden).at[..., :2].set(both)


@pytest.fixture(scope="module")
def told(request, make_tiny):
    """A model with such a drafter, plain decoding's state in passes of WIDTH rows, and the settings of both."""
    model = make_tiny(request.param, layers=2)
    settings = DecodeConfig(draft_steps=WIDTH - 1, max_new_tokens=NEW)
    knobs = make_knobs(settings, ())
    llama = join(model.definition, model.params).llama
    definition, params = split(SpeculativeLlama(llama, Placed(model.config.vocab_size)))
    with lightly_compiled():
        plain = start(model, PROMPTS, settings, knobs, record=True)
    begun = jax.tree.map(jnp.copy, plain)
    plain = decode_rounds(model.definition, model.decode_params, plain, knobs, PLAIN)
    return definition, params, begun.replace(drafter=plain.tokens), plain, knobs


@pytest.mark.parametrize(
    ("told", "rows"),
    [("bfloat16", 16), ("float32", 8), pytest.param("float32", 16, marks=pytest.mark.full)],
    indirect=["told"],
)
def test_every_path_that_is_right_is_committed(told, rows):
    """Every accept length, every place of a right draft: tokens and every bit are plain decoding's."""
    definition, params, begun, plain, knobs = told
    tree = decode_rounds(definition, params, jax.tree.map(jnp.copy, begun), knobs, Plan("tree", rows))
    lengths, taken = set(), set()
    for sequence, prompt in enumerate(PROMPTS):
        length = len(prompt) + NEW
        np.testing.assert_array_equal(tree.tokens[sequence, :length], plain.tokens[sequence, :length])
        found, right = (
            np.asarray(x.signals.features.final[sequence, 1:length].astype(jnp.float32)).view(np.int32)
            for x in (tree, plain)
        )
        np.testing.assert_array_equal(found, right)
        at = len(prompt) + 1
        for accepted in np.asarray(tree.accept_lengths[sequence]):
            if not accepted:
                break
            lengths.add(int(accepted))
            taken |= {PLACES[position % len(PLACES)] for position in range(at, at + accepted - 1)}
            if at + 1 < length:  # all four children of the root have a row
                assert (accepted > 1) == (PLACES[at % len(PLACES)] < 4)
            at += accepted
    assert lengths == set(range(1, Plan("tree", rows).drafts + 2))
    assert taken == {0, 1, 2, 3}


@pytest.mark.parametrize("told", ["bfloat16"], indirect=True)
def test_signals_judge_the_first_choice_behind_every_row_of_the_path(told):
    """Where it is right the place is 0: reward 1; where another of its siblings was, or none, 0."""
    definition, params, begun, plain, knobs = told
    tree = decode_rounds(definition, params, jax.tree.map(jnp.copy, begun), knobs, Plan("tree", 16))
    for sequence, prompt in enumerate(PROMPTS):
        judged = 0
        for position in range(len(prompt) + 1, len(prompt) + NEW):
            reward = int(tree.signals.reward[sequence, position])
            if reward < 0:
                continue
            judged += 1
            proposal = int(tree.signals.proposal[sequence, position])
            token = int(plain.tokens[sequence, position])
            assert reward == (proposal == token) == (PLACES[position % len(PLACES)] == 0)
        assert judged > NEW // 2
