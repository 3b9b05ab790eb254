"""How the programs of tests are compiled: nine tenths of the suite's time, at what users get.

A program compiled without most optimisations is ready in half the time, computes the same formulas, and is as good for
what a test says of files, updates, counts and distributions. Where bits of differently shaped programs are compared,
it would prove less than it should, as vectors and fused loops are where such bits part: those modules are marked
`optimized`. They take machine code from XLA's older emitters, where there are any: those have vectors, fused
multiplications and products of the same kernels, at two thirds of the cost. Modules whose programs are to be those of
users in everything are marked `optimized(emitters=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import compiler  # jax has no public way to give an option of XLA to all programs from now on

FLAG = "jax_disable_most_optimizations"
# One piece for each program, not 32, is less work, and so are loops that are vectors but not unrolled. Neither changes
# what is computed in which order.
QUICKER = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
DEVICES = "--xla_force_host_platform_device_count=4"  # made up, for tests of meshes; others see the first alone
# XLA's newer way from a fused loop to machine code goes through MLIR, which costs three times what the older does; with
# jax 0.11 there is no older one.
EMITTERS = "xla_cpu_use_fusion_emitters"
_has_older = False  # whether there is an older way
_emitters = True  # whether optimised programs come from the newer way
_mixed = False  # whether an optimised module left programs of the other kind, whose bits may differ


def begin() -> None:
    """Has all programs compiled as described here, those of processes started from here too; before the first one."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKER} {DEVICES}".strip()
    global _has_older
    with suppress(jax.errors.JaxRuntimeError):  # XLA reads them here, and what `optimize` adds reaches others alone
        jax.jit(lambda: 0).lower().compile(compiler_options={EMITTERS: False})
        _has_older = True
    options_of_jax = compiler.get_compile_options

    def options(*args: Any, **kwargs: Any) -> Any:
        chosen = options_of_jax(*args, **kwargs)
        if _has_older and (jax.config.read(FLAG) or not _emitters):
            chosen.env_option_overrides = [*chosen.env_option_overrides, (EMITTERS, False)]
        return chosen

    compiler.get_compile_options = options


def optimize(yes: bool, *, emitters: bool = False) -> None:
    """How all is compiled from now on, here and in processes started from here; programs of another kind go.

    `emitters`: optimised programs come from XLA's newer emitters, as those of users do.
    """
    global _emitters, _mixed
    os.environ[FLAG.upper()] = str(int(not yes))
    others = os.environ["XLA_FLAGS"].removesuffix(f" --{EMITTERS}=false")
    os.environ["XLA_FLAGS"] = others if emitters or not _has_older else f"{others} --{EMITTERS}=false"
    if jax.config.read(FLAG) == yes or _emitters != emitters or _mixed:
        jax.config.update(FLAG, not yes)
        jax.clear_caches()
        _emitters, _mixed = emitters, False


@contextmanager
def lightly_compiled(*, weights: bool = False) -> Iterator[None]:
    """Within an optimised module, for programs that no other part of it runs.

    `weights`: they make random weights, whichever way they are compiled, so other modules may have them too.
    """
    global _mixed
    before = jax.config.read(FLAG)
    jax.config.update(FLAG, True)
    _mixed = _mixed or not (before or weights)
    try:
        yield
    finally:
        jax.config.update(FLAG, before)
