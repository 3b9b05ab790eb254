"""What the tests of learning share: decoding by the very program that rollouts use."""

import pytest

from dvi_jax.decode.batch import choose_plan, make_knobs, read_generations, start
from dvi_jax.decode.speculative import decode_rounds
from tests.conftest import tiny_model


@pytest.fixture(scope="session")
def make_tiny():
    """make_tiny(...): as everywhere, with one shallow and one deep layer where no number of layers is asked for."""
    return lambda *arguments, **options: tiny_model(*arguments, **{"layers": 2} | options)


@pytest.fixture(scope="session")
def rollout_ids():
    """rollout_ids(model, prompts, settings, longest_prompt=...): ids as `rollout` gives them, `plain` or drafted."""

    def decode(model, prompts, settings, *, longest_prompt, plain=False):
        knobs = make_knobs(settings, model.eos_ids, plain=plain)
        state = start(model, prompts, settings, knobs, record=True, longest_prompt=longest_prompt)
        plan = choose_plan(model, settings, plain=plain)
        state = decode_rounds(model.definition, model.decode_params, state, knobs, plan)
        return [row.output_ids for row in read_generations(state, [len(p) for p in prompts], model.eos_ids)]

    return decode
