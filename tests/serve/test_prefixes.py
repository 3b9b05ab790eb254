"""What prompts share is taken in once: a hit gives the bits of a miss, and memory stays within its budget."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import SamplingConfig
from dvi_jax.serve.intake import Intake
from dvi_jax.serve.prefixes import Block, Prefixes
from dvi_jax.serve.programs import Programs
from dvi_jax.serve.requests import Request
from dvi_jax.serve.slots import Shape, Terms


def test_hits_and_misses_have_equal_bits(model, make_engine, pieces_of):
    """All that a reply is made of, its features too: `tokens` alone might hide a difference."""
    windows = []
    prompt = tuple(np.random.default_rng(0).integers(2, 258, 50).tolist())
    request = Request(prompt, 24, eos_ids=())
    other = replace(request, prompt_ids=(*prompt[:40], 7, 7, 7))
    with make_engine(model, prefix_bytes=10**6, on_window=lambda window, _: windows.append(window)) as engine:
        handles = []
        for asked in (request, other, request, replace(request, learn=False)):
            handles.append(engine.submit(asked))
            pieces_of(handles[-1])
    assert [handle.statistics.cached_tokens for handle in handles] == [0, 32, 48, 48]
    first, between, again = windows
    length = int(first.length[0])
    assert (int(first.prompt_length[0]), length) == (50, 74)
    assert int(between.prompt_length[0]) == 43
    rows = [[np.asarray(leaf[0, :length], np.float32) for leaf in window_rows(window)] for window in (first, again)]
    assert all(np.array_equal(*pair) for pair in zip(*rows, strict=True))
    assert set(np.asarray(first.reward[0, 51:74]).tolist()) >= {0, 1}
    assert tuple(first.tokens[0, :50].tolist()) == prompt
    assert np.abs(rows[0][-1][1:]).max(axis=-1).min() > 0  # features of every position but the first


def window_rows(window):
    return [window.tokens, window.proposal, window.reward, window.step, *jax.tree.leaves(window.features)]


def test_what_is_kept_in_8_bits_is_laid_back_to_the_bit(model):
    """The chunk behind a prefix's two, and keys and values of all three: computed, and with two of them laid back."""
    model = model.with_kv("int8")
    programs = Programs(model, Shape(1, 64, 1, record=False), chunk=16, prefix_bytes=10**6)
    intake = Intake(programs, (16,))
    prompt, found = tuple(range(2, 42)), []
    terms = Terms.of(len(prompt), 1, (), SamplingConfig(temperature=0.0), model.config.vocab_size).packed()
    for _ in range(2):
        reply = SimpleNamespace(request=Request(prompt, 1), statistics=SimpleNamespace(cached_tokens=0))
        intake.begin([reply])
        while not intake.is_ready:
            intake.step()
        intake.lay(np.zeros(1, np.int32), terms, sampled=False)
        filled = programs._filled
        found.append(jax.device_get((filled.shallow, filled.deep, filled.features)))
    assert reply.statistics.cached_tokens == 32
    assert found[0][0][0].key.values.dtype == np.int8
    jax.tree.map(np.testing.assert_array_equal, *found)


def block(value):
    return Block({"tokens": jnp.full((1, 4), value, jnp.int32)}, ())


def test_least_recently_used_are_dropped():
    """Within the budget; a block never outlives those before it."""
    prefixes = Prefixes(chunk=4, budget=5 * 16)
    prompts = [[1] * 9, [2] * 9, [1] * 4 + [3] * 9]
    for prompt in prompts:
        names = prefixes.names(prompt)
        known = prefixes.find(names)
        for name in names[len(known) :]:
            prefixes.keep(name, block(prompt[0]))
    # 1, 11, 2, 22 and, behind the first, 13; 133 takes the place of 11, which was used before all others.
    assert prefixes.bytes == 5 * 16
    assert [len(prefixes.find(prefixes.names(prompt))) for prompt in prompts] == [1, 2, 3]


def test_a_prompt_is_known_by_all_that_is_before():
    prefixes = Prefixes(chunk=4, budget=10**6)
    names = prefixes.names([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(names) == 2
    assert prefixes.names([1, 2, 3, 4, 5, 6, 7, 8]) == names[:1]  # the last token is always computed
    assert prefixes.names([0, 2, 3, 4, 5, 6, 7, 8, 9])[1] != names[1]
    prefixes.keep(names[1], block(1))
    assert prefixes.find(names) == []
    assert Prefixes(chunk=4, budget=0).names([1] * 9) == []
