"""Large programs of an engine or a learner, compiled side by side: XLA takes seconds for each, mostly of one core."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dvi_jax.decode.plan import Plan
from dvi_jax.model.speculative_llama import Definition, Params
from dvi_jax.serve.prompts import packed_whole, take_whole
from dvi_jax.serve.slots import TERM_COLUMNS, Slots, calls_of, run_stretch

AT_ONCE = 4  # compilations, where there are as many cores


def compile_stretches(
    definition: Definition, params: Params, slots: Slots, wanted: Iterable[tuple[Plan, int, bool]]
) -> None:
    """Rounds by each plan, in pieces of so many (0: none), sampled or not: `run_stretch` compiles nothing then."""
    compile_all(
        run_stretch.lower(definition, params, slots, calls_of(1, piece)[0], plan, sampled=sampled, piece=piece)
        for plan, piece, sampled in wanted
    )


def compile_wholes(definition: Definition, params: Params, slots: Slots, sizes: Iterable[int]) -> None:
    """Prompts of one chunk of so many tokens: `take_whole` compiles nothing then."""
    place, terms = np.zeros(1, np.int32), np.zeros((1, TERM_COLUMNS), np.int32)
    packed = (packed_whole(np.zeros((1, size), np.int32), place, terms) for size in sizes)
    compile_all(take_whole.lower(definition, params, slots, whole) for whole in packed)


def compile_all(programs: Iterable[jax.stages.Lowered]) -> None:
    """All of these; who calls one with the same arrays finds it compiled.

    Several processes compile as they run, one program after the other: they must do it together.
    """
    if jax.process_count() > 1:
        return
    pool = ThreadPoolExecutor(min(AT_ONCE, _cores()))
    try:
        under_way = [pool.submit(lowered.compile) for lowered in programs]
        for compilation in under_way:
            compilation.result()
    finally:  # after Ctrl-C or an error the rest is not waited for
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
