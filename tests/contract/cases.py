"""The axes of the contract, and which combinations of their values are tried.

`make test` tries each value of an axis once against the defaults of the others, and the named pairs; `make contract`
the full product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from dvi_jax.config import KV, WHOLE_KV
from dvi_jax.model.drafters import DRAFTERS
from tests.contract.probe import PROBES

KINDS = DRAFTERS | {probe.kind: probe for probe in PROBES}
AXES = {
    "drafter": tuple(KINDS),
    "dtype": ("float32", "bfloat16"),
    "draft_steps": (3, 1),
    "sampling": ("greedy", "coupled", "rejection"),
    "batch": (3, 1),
    "prefix": (False, True),
    "exit": ("early", "none"),
    "trunk": ("shared", "separate"),
    "vocabulary": ("whole", "few"),
    "plan": ("early-exit", "chain", "tree"),
    "weights": ("whole", "int8", "int4", "float8"),
    "mesh": ("", "model=2", "data=3"),
    "kv": KV,
}


@dataclass(frozen=True)
class Case:
    """One combination; the defaults are the first values of `AXES`, but for the drafter."""

    drafter: str = "fused"
    dtype: str = "float32"
    draft_steps: int = 3
    sampling: str = "greedy"
    batch: int = 3
    prefix: bool = False  # the prompts' beginning is taken in before, by `make_prefix`
    exit: str = "early"  # none: the model is not split, and drafts are made from the embeddings of tokens
    trunk: str = "shared"  # separate: lora_S inside the shallow layers too
    vocabulary: str = "whole"  # few: drafts are chosen from a part of the vocabulary
    weights: str = "whole"  # else what the verifier's matrices are kept in (with int4, `down` is in int8: 48 inputs)
    kv: str = WHOLE_KV  # what keys and values are kept in
    plan: str = "early-exit"  # chain: rounds written out, plain decoding a program of its own; tree: of as many rows
    mesh: str = ""  # over which devices, as --mesh has it

    def __str__(self) -> str:
        """What differs from the defaults."""
        default = Case()
        return "-".join(f"{n}={getattr(self, n)}" for n in AXES if getattr(self, n) != getattr(default, n)) or "default"

    @property
    def is_possible(self) -> bool:
        """Without shallow layers there is no place for a lora_S, and a block drafter's chains are one plan.

        A batch divides among the devices along `data`, and the blocks of a matrix in four bits among those along
        `model`: the tiny verifier has one block a row.
        """
        by_steps = not (self.drafts_blocks or KINDS[self.drafter].needs_exit_layer)
        if self.exit == "none" and (self.trunk == "separate" or not by_steps):  # blocks are drafted without one anyway
            return False
        if (self.mesh == "data=3" and self.batch != 3) or (self.mesh == "model=2" and self.weights == "int4"):
            return False
        return not ((self.trunk == "separate" or self.plan == "chain") and self.drafts_blocks)

    @property
    def drafts_blocks(self) -> bool:
        """Whether the drafter makes all drafts of a round in one pass."""
        return self.drafter in ("medusa", "block", "tapped_block")

    @property
    def compiled_lightly(self) -> bool:
        """Whether no bits are compared, or the verifier's pass is that of a case which is optimised.

        Then optimising it (tests/compiling.py) would prove nothing more: what differs is how drafts are made.
        """
        if self.sampling == "rejection" or self._drafts_otherwise:
            return True
        first = optimised().get(self._verifying, self)
        return replace(self, prefix=first.prefix) != first

    @property
    def _drafts_otherwise(self) -> bool:
        """Whether it is the default case but for how drafts are made and chosen."""
        alike = replace(Case(), drafter=self.drafter, sampling=self.sampling, vocabulary=self.vocabulary)
        return self == alike and self != Case()

    @property
    def _verifying(self) -> tuple[str, str, int, str, str, str]:
        """What shape, types, plan and devices the verifier's pass has."""
        return self.dtype, self.exit, self.batch, self.settings_plan, self.mesh, self.kv

    @property
    def settings_plan(self) -> str:
        """The plan as settings name it."""
        if self.plan == "tree":
            return f"tree:{self.draft_steps + 1}"
        return f"{'block' if self.drafts_blocks else self.plan}:{self.draft_steps}"


BEGINNING = [7, 40, 3, 21]  # what all prompts begin with
PROMPTS = [[*BEGINNING, 5, 9], [*BEGINNING, 30], [*BEGINNING, 2, 2, 51, 8]]

PAIRS = (
    Case(drafter="medusa", sampling="rejection", batch=1),
    Case(drafter="tapped_step", trunk="separate", prefix=True),
    Case(plan="chain", dtype="bfloat16", sampling="coupled", prefix=True),
    Case(plan="chain", drafter="kangaroo", sampling="rejection"),
    Case(plan="chain", drafter="tapped_step", dtype="bfloat16", prefix=True),
    Case(plan="tree", dtype="bfloat16", trunk="separate"),
    Case(plan="tree", dtype="bfloat16", weights="int4"),
    Case(plan="tree", exit="none", sampling="coupled"),
    Case(plan="chain", exit="none", dtype="bfloat16", prefix=True),
    Case(plan="tree", drafter="medusa", sampling="coupled"),
    Case(plan="tree", kv="int8", sampling="coupled"),
    Case(plan="tree", drafter="kangaroo", sampling="rejection"),
    Case(plan="tree", drafter="tapped_block", dtype="bfloat16", prefix=True),
)


def star() -> list[Case]:
    """Each value of an axis against the defaults of the others, and the pairs."""
    cases = [replace(Case(), **{name: value}) for name, values in AXES.items() for value in values]
    return list(dict.fromkeys([*cases, *PAIRS]))


@cache
def optimised() -> dict[tuple[str, str, int, str, str, str], Case]:
    """The first case of `star` for each shape, types, plan and mesh of the verifier's pass."""
    cases = [case for case in star() if not (case.sampling == "rejection" or case._drafts_otherwise)]
    return {case._verifying: case for case in reversed(cases)}


def along(cases: list[Case], axes: tuple[str, ...]) -> list[Case]:
    """The cases as far as they differ along `axes`, at the defaults of the others."""
    return list(dict.fromkeys(replace(Case(), **{name: getattr(case, name) for name in axes}) for case in cases))


def everything() -> list[Case]:
    """The full product."""
    every = (Case(**dict(zip(AXES, values, strict=True))) for values in product(*AXES.values()))
    return [case for case in every if case.is_possible]
