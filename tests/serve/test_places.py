"""What an engine's programs are given and tell lies where it lay: what a GPU has recorded of them stays valid."""

import gc
import itertools
import weakref

import jax
import numpy as np
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.serve.places import GAP_BYTES, GAPS_EACH, Places, gaps, on_its_way
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.slots import Shape, Terms

pytestmark = pytest.mark.optimized
SLOTS, CHUNK = 3, 16


def addresses(tree):
    """Of every array but keys, by its place in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer()
        for path, leaf in leaves
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


@pytest.mark.parametrize("drafter", ["kangaroo", "fused"])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_no_array_of_a_running_engine_moves(make_model, drafter, together, sampled):
    model = make_model(drafter=drafter)
    shape = Shape(SLOTS, 64, 3, record=True, together=together)
    programs = Programs(model, shape, chunk=CHUNK, prefix_bytes=0 if together > 1 else 2**20)
    sampling = SamplingConfig(temperature=0.9 if sampled else 0.0, seed=3)
    terms = Terms.of(CHUNK + 5, 9, (), sampling, model.config.vocab_size)
    terms = Terms.joined([terms] * together).packed()
    short = Terms.of(CHUNK - 3, 9, (), sampling, model.config.vocab_size).packed()
    tokens = np.full((together, CHUNK), 7, np.int32)

    def serve(slot, plan, *, again=False):
        """Prompts of two chunks and of one into a slot, and a stretch in two pieces; what came of it.

        `again`: the first chunk of two is what was kept of it.
        """
        places = np.array([slot, SLOTS][:together], np.int32)
        if again and together == 1:
            assert programs.lay_back(b"first chunk") == 1
        else:
            programs.take(tokens, terms[:, 0], 0)
        if together == 1:
            programs.keep(b"first chunk")
        programs.take(tokens, terms[:, 0], CHUNK)
        firsts = [programs.lay(places, terms, sampled)]
        if together == 1:
            firsts.append(programs.take_whole(tokens, places, short, sampled))
        found = firsts, programs.stretch(4, plan, sampled, 2)
        programs.release(np.arange(SLOTS) == slot)
        return found

    def arrays():
        return addresses((programs.slots, programs._filled, programs._places._arrays))

    serve(0, PLAIN)
    where = arrays()
    turns = itertools.product(range(SLOTS), (Plan("chain", 2), PLAIN), (False, True))
    kept = [serve(slot, plan, again=again) for slot, plan, again in turns]
    assert arrays() == where
    for told in zip(*(firsts for firsts, _ in kept), strict=True):
        assert len({int(first[0, 0]) for first in told}) == 1  # and what was told before is still there
    for _, packed in kept:
        assert [np.asarray(piece).shape for piece in packed] == [programs.slots.told.shape] * 2


def test_what_is_put_replaces_what_was_there():
    places = Places(stay=True)
    first = places.put(np.array([1, 2], np.int32))
    address, sent = first.unsafe_buffer_pointer(), on_its_way(first)
    second = places.put(np.array([3, 4], np.int32))
    assert second.unsafe_buffer_pointer() == address
    assert (sent.tolist(), second.tolist(), first.is_deleted()) == ([1, 2], [3, 4], True)
    assert places.put(np.array([5, 6], np.float32)).tolist() == [5, 6]
    assert second.tolist() == [3, 4]  # of another kind
    given = np.array([7], np.int32)
    assert Places(stay=False).put(given) is given


def test_no_array_that_learns_moves(make_learner, some_ended):
    candidate = make_learner()._candidate

    def arrays():
        told = candidate._report, candidate._places._arrays
        return addresses((candidate.state, candidate.replay, told))

    def learn(rate):
        for ended in some_ended:
            candidate.take(ended)
        candidate.begin_update(rate)
        return candidate.look()

    first, where = learn(0.5), arrays()
    second = learn(0.25)
    assert arrays() == where
    assert (first.rate, second.rate) == (0.5, 0.25)
    assert first.values["loss"] != second.values["loss"]


def test_a_drafter_that_goes_live_lies_where_an_earlier_one_lay(make_learner, some_ended):
    """However many do; and none that may come back, or that somebody was given, is written over."""
    learner = make_learner()
    given, found = [], set()
    for update in range(12):
        for ended in some_ended:
            learner._candidate.take(ended)
        learner._candidate.begin_update(1.0)
        learner._candidate.look()
        if update % 5 == 2:
            learner._hold(learner._live)
        elif update % 5 == 4:
            learner._take_back({"reason": "a test's"})
        before = weights_of(learner._live)
        good = weights_of(learner._good)
        learner._tried = learner._live
        learner._swap()
        assert weights_of(learner._tried) == before
        assert weights_of(learner._good) == good
        assert weights_of(learner._live) == weights_of(learner._candidate.state)
        learner._new_params()
        given.append((learner.params(), weights_of(learner._live)))
        found.add(tuple(addresses(learner._live).values()))
    assert len(found) <= 4
    for params, weights in given:
        assert bytes_of({"drafter": params.drafter, "lora_s": params.lora_s}) == weights


def weights_of(state):
    return bytes_of(state.served)


def bytes_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_between_what_is_kept_there_is_room_for_what_is_small(monkeypatch):
    """Of those that are made one after the other, every second one."""
    made, put = [], jax.device_put

    def noted(array, device):
        made.append(weakref.ref(found := put(array, device)))
        return found

    monkeypatch.setattr(jax, "device_put", noted)
    kept = gaps(jax.devices()[:1])
    gc.collect()
    assert [array.nbytes for array in kept] == [size for size in GAP_BYTES for _ in range(GAPS_EACH)]
    assert [known() is not None for known in made] == [False, True] * len(kept)
