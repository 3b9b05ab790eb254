"""Plans: how a compiled round drafts.

A plan is fixed in its program, whose rounds are straight-line code: no condition inside one is read by the host.
Thresholds, limits and costs mask drafts, they do not skip them. Adapting means to change between plans from one stretch
of rounds to the next. `early-exit` alone asks before every draft whether one is wanted: Kangaroo's own way, and right
for CPUs, where such a question costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import jax

from dvi_jax.config import MOST_DRAFTS, DecodeConfig, LlamaConfig
from dvi_jax.errors import UserError
from dvi_jax.model.attention import has_round_kernels

Kind = Literal["plain", "chain", "block", "early-exit", "tree"]
MOST_TREE_ROWS = 64  # of a tree


class Growth(NamedTuple):
    """How a tree is grown (`tree.py`)."""

    levels: int  # drafts of its longest path, each a pass of a step drafter
    beam: int  # nodes of a level that the next drafts from
    children: int  # tokens drafted from each


@dataclass(frozen=True)
class Plan:
    """A way of drafting, and how much of it."""

    kind: Kind
    size: int = 0  # of a tree its rows, else the drafts of a round
    levels: int = 0  # drafts of a tree's longest path, 0 for as many as suit its rows

    def __post_init__(self) -> None:
        least, most = {"plain": (0, 0), "tree": (2, MOST_TREE_ROWS)}.get(self.kind, (1, MOST_DRAFTS))
        if not least <= self.size <= most:
            what = "has between {} and {} rows" if self.kind == "tree" else "makes between {} and {} drafts"
            raise UserError(f"plan {self}: a {self.kind} plan {what.format(least, most)}")
        if self.levels and not (self.kind == "tree" and self.levels <= min(MOST_DRAFTS, self.size - 1)):
            raise UserError(f"plan {self}: a tree of so many rows has at most {self.size - 1} levels, others none")

    @property
    def rows(self) -> int:
        """Rows of a sequence that a round verifies: the pending token's and the drafts'."""
        return self.size if self.kind == "tree" else self.size + 1

    @property
    def drafts(self) -> int:
        """Most drafts of a round that can be right: of a tree, those of its longest path."""
        return min(self.growth.levels, self.size - 1) if self.kind == "tree" else self.size

    @property
    def growth(self) -> Growth:
        """What suits a tree of so many rows: levels pay where most of what they reach finds a row."""
        levels = self.levels or (2 if self.size <= 8 else 3 if self.size <= 32 else 4)
        return Growth(levels, 4 if self.size <= 16 else 8, 4)

    @property
    def is_plains_program(self) -> bool:
        """Whether plain decoding of its row class is the very same program."""
        return self.kind in ("plain", "early-exit")

    def __str__(self) -> str:
        levels = f"x{self.levels}" if self.levels else ""
        return self.kind if self.kind == "plain" else f"{self.kind}:{self.size}{levels}"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that `str` gives as `text`; `UserError` where there is none such."""
        kind, _, numbers = text.partition(":")
        size, _, levels = numbers.partition("x")
        counted = re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})?", numbers, re.ASCII)
        if kind not in get_args(Kind) or (kind == "plain") != (numbers == "") or (numbers and not counted):
            raise UserError(f"plan {text!r}: it must be plain, chain:N, block:N, tree:ROWS[xLEVELS] or early-exit:N")
        return cls(kind, int(size or 0), int(levels or 0))  # type: ignore[arg-type]  # one of Kind's values


PLAIN = Plan("plain")


class Option(NamedTuple):
    """A plan, and how many rows of a sequence the passes of its generation may have."""

    plan: Plan
    width: int

    @property
    def name(self) -> str:
        """What tells it from others of a model in a file."""
        return f"{self.plan}/{self.width}"

    def settings(self, other: DecodeConfig) -> DecodeConfig:
        """The settings of a generation that begins so, all else as in `other`."""
        return replace(other, draft_steps=self.width - 1, plan=str(self.plan))


def drafts_of(plan: Plan) -> int:
    """The `draft_steps` of a generation that follows a plan on this device."""
    if plan.kind == "tree" and jax.default_backend() == "cpu":
        return min(plan.rows - 1, MOST_DRAFTS)  # there a tree has no more rows than a chain would have
    return plan.drafts


def plan_for(draft_steps: int, *, drafts_blocks: bool) -> Plan:
    """The plan of a round of at most `draft_steps` drafts on this device."""
    if not draft_steps:
        return PLAIN
    if drafts_blocks:
        return Plan("block", draft_steps)
    return Plan("early-exit" if jax.default_backend() == "cpu" else "chain", draft_steps)


def check_plan(plan: Plan, drafter: str, *, drafts_blocks: bool, max_drafts: int | None) -> None:
    """Raise `UserError` for a plan that a drafter of this kind cannot follow."""
    if plan.kind not in ("plain", "tree") and (plan.kind == "block") != drafts_blocks:
        right = "block:N or tree:ROWS" if drafts_blocks else "chain:N, tree:ROWS or early-exit:N"
        raise UserError(f"plan {plan}: drafter {drafter} takes {right}")
    if max_drafts is not None and plan.drafts > max_drafts:
        raise UserError(f"plan {plan}: drafter {drafter} drafts at most {max_drafts}")


def rows_alike(rows: int, config: LlamaConfig, dtype: jax.typing.DTypeLike) -> bool:
    """Whether a row's bits are the same among any number of rows up to `rows` (batch times rows of a sequence).

    So they are in the GPU kernels. Elsewhere they depend on that number: there all plans of a generation verify as many
    rows as its widest.
    """
    return has_round_kernels(rows, config.head_dim, jax.numpy.dtype(dtype))


def trees_are_plain(batch: int, plan: Plan, config: LlamaConfig, dtype: jax.typing.DTypeLike) -> bool:
    """Whether so many trees together have the bits of plain decoding; without kernels, passes of as many rows do."""
    return not rows_alike(plan.rows, config, dtype) or rows_alike(batch * plan.rows, config, dtype)


def row_class(batch: int, width: int, config: LlamaConfig, dtype: jax.typing.DTypeLike) -> str:
    """What equal bits are relative to: `any` number of rows, or passes of just so many, batch by rows of a sequence."""
    return "any" if rows_alike(batch * width, config, dtype) else f"{batch}x{width}"
