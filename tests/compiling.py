"""How the programs of tests are compiled: nine tenths of the suite's time, at what users get.

A program compiled without most optimisations is ready in half the time, computes the same formulas, and is as good for
what a test says of files, updates, counts and distributions. Where bits of differently shaped programs are compared,
it would prove less than it should, as vectors and fused loops are where such bits part: those modules are marked
`optimized`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

FLAG = "jax_disable_most_optimizations"
_mixed = False  # whether an optimised module left programs of the other kind, whose bits may differ


def optimize(yes: bool) -> None:
    """How all is compiled from now on, here and in processes started from here; programs of the other kind go."""
    global _mixed
    os.environ[FLAG.upper()] = str(int(not yes))
    if jax.config.read(FLAG) == yes or _mixed:
        jax.config.update(FLAG, not yes)
        jax.clear_caches()
        _mixed = False


@contextmanager
def lightly_compiled() -> Iterator[None]:
    """Within an optimised module, for programs that no other part of it runs."""
    global _mixed
    before = jax.config.read(FLAG)
    jax.config.update(FLAG, True)
    _mixed = _mixed or not before
    try:
        yield
    finally:
        jax.config.update(FLAG, before)
