"""Programs that were compiled side by side are those that run."""

import jax
import numpy as np
import pytest

from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.serve.compiling import compile_stretches
from dvi_jax.serve.slots import Shape, calls_of, empty_slots, run_stretch

pytestmark = pytest.mark.optimized
COMPILED = "/jax/core/compile/backend_compile_duration"


def test_what_was_compiled_is_not_compiled_again(model):
    compiled = []
    slots = empty_slots(model.definition, model.decode_params, Shape(3, 64, 3, False))
    wanted = [(PLAIN, 0, False), (PLAIN, 3, True), (Plan("chain", 2), 3, False)]
    compile_stretches(model.definition, model.decode_params, slots, wanted)
    listener = lambda event, seconds, **details: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for plan, piece, sampled in wanted:
            (limit,) = calls_of(1, piece)
            slots = run_stretch(model.definition, model.decode_params, slots, limit, plan, sampled=sampled, piece=piece)
            assert np.asarray(slots.told).shape[0] == 3
        assert COMPILED not in compiled
        (limit,) = calls_of(1, 3)
        run_stretch(model.definition, model.decode_params, slots, limit, Plan("chain", 2), sampled=True, piece=3)
        assert COMPILED in compiled  # it would have been noticed
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
