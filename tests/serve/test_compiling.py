"""Programs that were compiled side by side are those that run."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.serve import candidate
from dvi_jax.serve.compiling import compile_stretches
from dvi_jax.serve.slots import Shape, calls_of, empty_slots, run_stretch

pytestmark = pytest.mark.optimized
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """The name of each program that XLA has compiled."""
    found = []

    def listen(event, seconds, **details):
        if event == COMPILED:
            found.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_what_was_compiled_is_not_compiled_again(model, compiled):
    slots = empty_slots(model.definition, model.decode_params, Shape(3, 64, 3, False))
    wanted = [(PLAIN, 0, False), (PLAIN, 3, True), (Plan("chain", 2), 3, False)]
    compile_stretches(model.definition, model.decode_params, slots, wanted)
    compiled.clear()
    for plan, piece, sampled in wanted:
        (limit,) = calls_of(1, piece)
        slots = run_stretch(model.definition, model.decode_params, slots, limit, plan, sampled=sampled, piece=piece)
        assert np.asarray(slots.told).shape[0] == 3
    assert not compiled
    (limit,) = calls_of(1, 3)
    run_stretch(model.definition, model.decode_params, slots, limit, Plan("chain", 2), sampled=True, piece=3)
    assert compiled  # it would have been noticed


def test_a_learner_compiles_side_by_side_what_it_runs(make_model, make_learner, compiled, monkeypatch):
    """What takes long: updates of all drafts and of first ones, first weights, and what compares drafters."""
    large = ["jit(add_newest)", "jit(compare)", "jit(solve)", "jit(update)", "jit(update)"]
    side_by_side, found = candidate.compile_all, []

    def noted(programs):
        compiled.clear()
        side_by_side(programs)
        found.extend(compiled)

    monkeypatch.setattr(candidate, "compile_all", noted)
    jax.clear_caches()
    make_learner(replace(make_model(drafter="fused"), drafter_is_trained=False))
    assert sorted(name for name in found if name in large) == large
    assert sorted(name for name in compiled if name in large) == large  # none of them again
