"""An engine: a reply depends on its request alone, and none is lost, whatever else comes and goes."""

import asyncio
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.config import SamplingConfig
from dvi_jax.errors import UserError
from dvi_jax.model.speculative_llama import join
from dvi_jax.serve import prefixes, programs, prompts, slots
from dvi_jax.serve.requests import QueueFullError, Request
from tests.serve.traffic import random_requests

PROGRAMS = (
    *(prompts.take_chunk, prompts.take_whole, prompts._drawn, prompts.lay),
    *(prefixes.cut_block, prefixes._put),
    *(slots.run_stretch, slots._marked),
)


def serve_alone(engine, requests, pieces_of):
    return [pieces_of(engine.submit(request)) for request in requests]


def serve_in_company(engine, requests, pieces_of, meanwhile=lambda: None):
    """All replies of three threads that submit in random order and bursts, beside requests that are cancelled."""
    found = [[] for _ in requests]

    def submit(thread):
        rng = np.random.default_rng(thread)
        handles = {}
        for index in rng.permutation(range(thread, len(requests), 3)).tolist():
            handles[index] = engine.submit(requests[index])
            if rng.random() < 0.3:
                other = engine.submit(requests[rng.integers(len(requests))])
                if rng.random() < 0.7:
                    next(iter(other))  # leaving early cancels
                other.cancel()
                other.cancel()
            if rng.random() < 0.3:
                time.sleep(0.02)
        for index, handle in handles.items():
            found[index].append(pieces_of(handle))

    threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meanwhile()
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("dtype", "count", "sampled", "piece"),
    [
        ("float32", 40, True, 4),
        pytest.param("float32", 40, True, 1, marks=pytest.mark.full),
        pytest.param("bfloat16", 30, False, 0, marks=pytest.mark.full),
        pytest.param("bfloat16", 30, False, 8, marks=pytest.mark.full),
    ],
)
def test_replies_do_not_depend_on_company(
    make_model, make_engine, pieces_of, train_noise, monkeypatch, dtype, count, sampled, piece
):
    """Nor on the slot, on what is kept of other prompts, on what the drafter is by now, or on who else is sampled.

    Nor on whether stretches are read before the next one starts, and in what pieces.
    """
    monkeypatch.setattr("dvi_jax.serve.plans.piece_rounds", lambda *_: piece)
    model, requests = make_model(dtype), random_requests(count, seed=1)
    if not sampled:
        requests = [replace(request, sampling=None) for request in requests]
    drafters = [train_noise(model.params, "drafter", seed=seed, std=0.05) for seed in range(3)]
    with make_engine(model) as engine:
        alone = serve_alone(engine, requests, pieces_of)
    swaps = iter(range(10**6))
    with make_engine(model, prefix_bytes=10**6, ahead=piece > 0) as engine:
        together = serve_in_company(
            engine, requests, pieces_of, meanwhile=lambda: engine.swap(drafters[next(swaps) % 3])
        )
        assert engine.drain(10)
        status = engine.status()
    assert together == [[reply] for reply in alone]  # each once
    assert status.running == status.waiting == 0
    assert status.judged[0] > status.accepted[0] > 0
    assert 0 < status.rounds < status.slot_rounds
    assert status.slot_rounds % (4 * max(piece, 1)) == 0
    assert 0 < status.waited_seconds < status.busy_seconds > status.intake_seconds > 0
    assert 0 < status.handed_seconds < status.busy_seconds
    for request, (ids, text, reason) in zip(requests, alone, strict=True):
        assert len(ids) == request.max_new_tokens or reason != "length"
        assert reason == "stop" or (ids[-1] in request.eos_ids) == (reason == "eos")
        assert not any(stop in text for stop in request.stop)
    assert {reason for *_, reason in alone} == {"length", "eos", "stop"}


def test_replies_are_what_the_model_says(model, make_engine):
    """Greedy and sampled ones side by side, against one forward pass over each and the formula of coupled sampling.

    Their log-probabilities, too.
    """
    requests = [replace(request, eos_ids=(), stop=(), max_new_tokens=30) for request in random_requests(8, seed=2)]
    with make_engine(model, logprobs=4) as engine:
        handles = [engine.submit(replace(request, logprobs=3)) for request in requests]
        pieces = [list(handle) for handle in handles]
    replies = [[token for piece in reply for token in piece.ids] for reply in pieces]
    for handle in handles:
        statistics = handle.statistics
        assert statistics.new_tokens == 30 == 1 + statistics.rounds + statistics.accepted
        assert statistics.submitted <= statistics.started <= statistics.first_token <= statistics.finished
    tokens = np.zeros((8, 96), np.int32)
    for row, request, ids in zip(tokens, requests, replies, strict=True):
        row[: len(request.prompt_ids) + 30] = [*request.prompt_ids, *ids]
    logits = np.asarray(forward(model, tokens))
    for row, request, values in zip(tokens, requests, logits, strict=True):
        for position in range(len(request.prompt_ids), len(request.prompt_ids) + 30):
            assert row[position] == expected_token(values[position - 1], row[:position], request.sampling)
    assert len({request.sampling and request.sampling.temperature for request in requests}) == 4
    for request, values, reply in zip(requests, logits, pieces, strict=True):
        given = [logprob for piece in reply for logprob in piece.logprobs]
        log_p = jax.nn.log_softmax(values[len(request.prompt_ids) - 1 :][:30])
        assert [logprob.token for logprob in given] == [token for piece in reply for token in piece.ids]
        own = [row[logprob.token] for row, logprob in zip(log_p, given, strict=True)]
        assert np.allclose([logprob.logprob for logprob in given], own, atol=1e-4)
        best = np.sort(log_p, axis=1)[:, :-4:-1]
        assert np.allclose([[value for _, value in logprob.top] for logprob in given], best, atol=1e-4)
        assert all(logprob.top[0][0] == np.argmax(row) for logprob, row in zip(given, log_p, strict=True))


def forward(model, tokens):
    """Logits [B, T, V]."""

    @jax.jit
    def run(params):
        llama = join(model.definition, params).llama
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        return llama.logits(llama.deep(llama.shallow(tokens, None, positions)[0], None, positions)[0])

    return run(model.decode_params)


def expected_token(logits, before, sampling):
    """The best token, or that of log p plus the position's Gumbel noise."""
    if sampling is None or sampling.temperature == 0:
        return np.argmax(logits)
    seen = np.unique(before)
    logits = logits.copy()
    logits[seen] = (
        np.where(logits[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty) * logits[seen]
    )
    logits /= sampling.temperature
    order = np.argsort(-logits)[: sampling.top_k or None]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    kept = order[np.cumsum(p) - p < sampling.top_p]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), len(before)), 0)
    return kept[np.argmax((logits + np.asarray(jax.random.gumbel(key, logits.shape)))[kept])]


@pytest.mark.parametrize(("together", "chunk"), [(1, 16), (1, 64), (3, 16)])
def test_nothing_grows(model, make_engine, pieces_of, together, chunk):
    """Over 200 requests neither arrays on the device nor programs: all were compiled before the first."""
    with make_engine(model, prefix_bytes=50_000, warm_up=True, together=together, chunk=chunk) as engine:

        def serve(seed):
            for found in serve_in_company(engine, random_requests(100, seed), pieces_of):
                assert len(found) == 1
            with engine._changed:  # the last stretch has been read
                assert engine._changed.wait_for(engine._is_idle, 10)
            return sizes(), len(jax.live_arrays())

        def sizes():
            return [program._cache_size() for program in PROGRAMS]

        before = sizes()
        first = serve(3)
        assert first == serve(4)
        assert first[0] == before


@pytest.mark.parametrize(
    ("module", "name", "which"),
    [(programs, "run_stretch", 2), (programs, "take_whole", 3), (slots.Terms, "of", 6)],
    ids=["a stretch", "a prompt into its slot", "what that takes"],
)
def test_a_failure_reaches_every_reader(model, make_engine, monkeypatch, module, name, which):
    """Whatever fails before the first reply is whole, and wherever the others are then."""
    calls, right = [], getattr(module, name)

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == which:
            raise RuntimeError("the device\nis gone")
        return right(*arguments, **options)

    with make_engine(model) as engine:
        monkeypatch.setattr(module, name, fails)  # not before: plans are tried first, unless that is known already
        handles = [engine.submit(Request((5, index), 80, eos_ids=())) for index in range(6)]
        for handle in handles:
            with pytest.raises(UserError, match=r"^the engine failed: RuntimeError: the device is gone$"):
                list(handle)
        assert engine.status().failure == "the engine failed: RuntimeError: the device is gone"
        with pytest.raises(UserError, match="is gone"):
            engine.submit(Request((5,), 2))
        assert not engine.drain(10)


def test_waiting_draining_and_closing(model, make_engine, pieces_of):
    request = Request((9, 8, 7), 90, eos_ids=())
    with make_engine(model, max_waiting=2) as engine:
        running = []
        with pytest.raises(QueueFullError, match=r"2 requests are waiting") as error:
            running.extend(engine.submit(request) for _ in range(50))
        assert error.value.retry_after > 0
        assert len(running) >= 2
        running.pop().cancel()
        assert not engine.drain(0)
        with pytest.raises(UserError, match="takes no more requests"):
            engine.submit(request)
        assert engine.drain(60)
        replies = [pieces_of(handle) for handle in running]
        assert list(running[0]) == []  # pieces are given once
        assert {reason for *_, reason in replies} == {"length"}
        assert {len(ids) for ids, *_ in replies} == {90}
    engine = make_engine(model)
    left = [engine.submit(request) for _ in range(9)]
    engine.close()
    assert pieces_of(left[-1])[2] == "cancelled"
    assert {pieces_of(handle)[2] for handle in left[:-1]} <= {"cancelled", "length"}


def test_a_long_prompt_that_nobody_wants_is_taken_in_no_further(model, make_engine, pieces_of, monkeypatch):
    """Also where nothing runs beside it, and its chunks follow on one another."""
    handles, taken = [], []

    def take_chunk(*arguments):
        taken.append(1)
        if len(taken) == 2:
            handles[0].cancel()
        return prompts.take_chunk(*arguments)

    with make_engine(model) as engine:
        monkeypatch.setattr(programs, "take_chunk", take_chunk)
        with engine._changed:  # so that the handle is known before the first chunk
            handles.append(engine.submit(Request(tuple(range(2, 92)), 4, eos_ids=())))
        assert pieces_of(handles[0]) == ([], "", "cancelled")
        assert len(taken) == 2  # of 6
        assert len(pieces_of(engine.submit(Request((5, 6), 4, eos_ids=())))[0]) == 4


def test_event_loops_are_served_without_threads(model, make_engine, pieces_of):
    """Many readers in one loop; one leaves early, and its slot is for others."""
    requests = random_requests(12, seed=5)

    async def read(handle):
        pieces = [piece async for piece in handle.stream()]
        return [token for piece in pieces for token in piece.ids], pieces[-1].finish_reason

    async def leave(engine):
        handle = engine.submit(Request((3, 4), 90, eos_ids=()))
        pieces = handle.stream()
        await anext(pieces)
        await pieces.aclose()
        return handle

    async def serve(engine):
        threads = threading.active_count()
        left = await leave(engine)
        replies = await asyncio.gather(*(read(engine.submit(request)) for request in requests))
        assert threading.active_count() == threads
        return left, replies

    with make_engine(model) as engine:
        alone = [(ids, reason) for ids, _, reason in serve_alone(engine, requests, pieces_of)]
        left, replies = asyncio.run(serve(engine))
        assert replies == alone
        assert left.finish_reason == "cancelled"
        assert left.statistics.new_tokens < 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "at least one token"),
        ({"prompt_ids": (258,)}, "between 0 and 257"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_new_tokens": 95}, "has 2 tokens and 95 new ones were asked for; the engine's context holds 96"),
        ({"eos_ids": tuple(range(9))}, "at most 8"),
        ({"eos_ids": (3, 2**31)}, "between 0 and 2147483647, or -1 for none, got 3, 2147483648"),
        ({"sampling": SamplingConfig(coupled=False)}, "coupled"),
        ({"stop": ("",)}, "must not be empty"),
        ({"logprobs": 0}, "gives no log-probabilities"),
    ],
)
def test_what_cannot_be_served(model, make_engine, changes, message):
    with make_engine(model) as engine, pytest.raises(UserError, match=message):
        engine.submit(replace(Request((5, 6), 8), **changes))


def test_what_is_swapped_in_lies_where_the_last_did(make_model, make_engine, train_noise, pieces_of):
    """Copies of it, whatever becomes of the arrays that were given; and the model's own stay as they are."""
    model = make_model()  # whose arrays nobody has looked at: those are not given away
    before = jax.tree.map(jax.numpy.copy, model.params.drafter)
    given = [train_noise(model.params, "drafter", seed=seed, std=0.1) for seed in range(3)]
    with make_engine(model) as engine:
        places = []
        for params in given:
            engine.swap(params)
            pieces_of(engine.submit(Request((2, 3), 4, eos_ids=())))
            leaves = jax.tree.leaves(engine._programs.params.drafter)
            places.append([leaf.unsafe_buffer_pointer() for leaf in leaves])
            assert all(map(np.array_equal, leaves, jax.tree.leaves(params.drafter)))
    assert places[0] == places[1] == places[2]
    assert not set(places[0]) & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.params.drafter)}
    assert all(map(np.array_equal, jax.tree.leaves(model.params.drafter), jax.tree.leaves(before)))


def test_only_the_drafter_is_swapped(model, make_model, make_engine):
    with make_engine(model) as engine:
        other = make_model()
        with pytest.raises(UserError, match="not of the shapes"):
            engine.swap(model.params._replace(drafter={}))
        gone = jax.tree.map(jax.numpy.copy, model.params.drafter)
        jax.tree.map(lambda leaf: leaf.delete(), gone)
        with pytest.raises(UserError, match="no longer there"):
            engine.swap(model.params._replace(drafter=gone))
        with pytest.raises(UserError, match="verifier"):
            engine.swap(model.params._replace(lora_d={"weight": other.params.base}))
