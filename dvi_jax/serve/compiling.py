"""An engine's programs of rounds, compiled side by side: XLA takes seconds for each, mostly of a single core."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax

from dvi_jax.decode.plan import Plan
from dvi_jax.model.speculative_llama import Definition, Params
from dvi_jax.serve.slots import Slots, calls_of, run_stretch

AT_ONCE = 4  # compilations, where there are as many cores


def compile_stretches(
    definition: Definition, params: Params, slots: Slots, wanted: Iterable[tuple[Plan, int, bool]]
) -> None:
    """Rounds by each plan, in pieces of so many rounds (0: none), sampled or not: `run_stretch` compiles nothing then.

    It finds what was compiled for the same arrays. Several processes compile as they run, one program after the other:
    they must do it together.
    """
    if jax.process_count() > 1:
        return
    pool = ThreadPoolExecutor(min(AT_ONCE, _cores()))
    try:
        under_way = []
        for plan, piece, sampled in wanted:
            (limit,) = calls_of(1, piece)
            lowered = run_stretch.lower(definition, params, slots, limit, plan, sampled=sampled, piece=piece)
            under_way.append(pool.submit(lowered.compile))
        for compilation in under_way:
            compilation.result()
    finally:  # after Ctrl-C or an error the rest is not waited for
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
