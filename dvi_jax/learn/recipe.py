"""How to distil a drafter where nobody has tuned one: what the model's size, the device and the time there is come to.

The rules are what was measured (experiments/results/README.md). `fused`, one layer behind the first that sees four
inner layers of the verifier, has the best drafts; they come one after the other. From about three billion parameters
on, a pass of a decoder layer costs so much that a `block` of drafts in one pass is better: at 7B shapes a round of
seven costs 1.13 plain rounds, one of three drafts in sequence 1.27. Where the head is larger than such a layer, only
the most frequent tokens are drafted; a wider drafter learns at a lower rate (1e-3 served 576 dimensions, 6e-4 1,536).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import jax

from dvi_jax.config import WHOLE_KV, DistillConfig, LlamaConfig, MeshConfig
from dvi_jax.errors import UserError
from dvi_jax.learn.replies import ReplyConfig, batch_rows
from dvi_jax.model.drafters.inner import spread_taps
from dvi_jax.model.kept_kv import row_bytes
from dvi_jax.model.llama import base_shapes
from dvi_jax.settings import from_dict

BLOCK_FROM = 3e9  # parameters from which a block drafter is chosen
BLOCK_OPTIONS = {"layers": 2, "block": 7}
DRAFT_VOCABULARY = 32_768  # tokens that are drafted at most, of a vocabulary of more than twice as many
HIGHEST_RATE, WIDTH_OF_IT = 1e-3, 1024  # learning rate, and the dimensions beyond which it falls with them
CACHE_SHARE = 0.2  # of the memory that is free, for the keys and values of a batch of replies
REPLY_SHARE = 0.8  # of the tokens that a reply may have, it is taken to have so many


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a self-distillation makes; kept in its directory, so that it goes on with the same."""

    drafter: str  # kind of the drafter
    drafter_options: dict[str, Any] = field(hash=False)
    exit_layer: int | None  # None: a drafter that needs none
    replies: ReplyConfig
    draft_vocabulary: int = 0  # most frequent tokens, the only ones that are drafted; 0 for all
    lr: float = HIGHEST_RATE  # highest learning rate
    row_length: int  # tokens of a row of training text
    batch_rows: int  # rows of an update
    prompts: int = 0  # of the log that are replied to; 0: not known yet
    passes: int = 8  # over the replies while training
    save_every: int = 500  # updates between snapshots
    log_every: int = 20  # updates between metrics records

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` takes them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object, where: str) -> Recipe:
        """The recipe that `to_json` wrote; `UserError` naming `where` for anything else."""
        return from_dict(cls, data, where)

    def training(self, checkpoint: str, out: str, data: str, rows: int, mesh: MeshConfig) -> DistillConfig:
        """The training run on `rows` rows of packed replies at `data`, of which a few are held out.

        Those and the rows of an update divide among the devices of `mesh`; `UserError` where there are too few.
        """
        parts = mesh.data
        if rows < 2 * parts:
            raise UserError(
                f"the log's replies fill {rows} rows of {self.row_length} tokens, and distilling on data={parts} takes"
                f" {2 * parts}: give a longer log, or fewer devices"
            )
        held_out = -(-min(64, max(rows // 10, 1)) // parts) * parts
        batch_rows = min(self.batch_rows, max(rows - held_out, 1))
        return DistillConfig(
            checkpoint=checkpoint,
            out=out,
            data=(data,),
            drafter=self.drafter,
            drafter_options=self.drafter_options,
            exit_layer=self.exit_layer,
            draft_vocabulary=self.draft_vocabulary,
            lr=self.lr,
            tokens=self.passes * (rows - held_out) * self.row_length,
            row_length=self.row_length,
            batch_rows=max(batch_rows - batch_rows % parts, parts),
            eval_rows=held_out,
            save_every=self.save_every,
            log_every=self.log_every,
            mesh=mesh,
        )


def parameters(config: LlamaConfig) -> int:
    """Weights of the base model."""
    shapes = jax.tree.leaves(base_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    return sum(map(prod, shapes))


def choose_drafter(config: LlamaConfig) -> tuple[str, dict[str, Any], int | None]:
    """Kind, options and exit layer of the drafter that suits a model of this size."""
    taps = list(spread_taps(config))
    if parameters(config) < BLOCK_FROM:
        return "fused", {"taps": taps}, 1
    return "block", BLOCK_OPTIONS | {"taps": taps}, None


def choose_recipe(config: LlamaConfig, dtype: str, free: int, *, kv: str = WHOLE_KV, accelerator: bool) -> Recipe:
    """The recipe for a model on a device with `free` bytes; how many prompts it replies to is decided by the clock.

    A CPU takes short rows and few at once: its passes are bound by arithmetic, so that more gain nothing.
    """
    kind, options, exit_layer = choose_drafter(config)
    context = config.context_length
    new_tokens = min(120 if accelerator else 64, context // 2)
    classes = (128, 384) if accelerator else (128,)
    lengths = tuple(sorted({min(length, context - new_tokens) for length in classes}))
    kept = row_bytes(config.head_dim, dtype, kv)
    position = 2 * config.num_layers * config.num_kv_heads * kept  # bytes of its keys and values
    most = 81920 if accelerator else 8 * (lengths[0] + new_tokens)
    return Recipe(
        drafter=kind,
        drafter_options=options,
        exit_layer=exit_layer,
        replies=ReplyConfig(
            lengths=lengths, new_tokens=new_tokens, batch_tokens=max(min(most, int(CACHE_SHARE * free) // position), 1)
        ),
        draft_vocabulary=DRAFT_VOCABULARY if config.vocab_size > 2 * DRAFT_VOCABULARY else 0,
        lr=HIGHEST_RATE * min(WIDTH_OF_IT / config.hidden_size, 1.0),
        row_length=min(1024 if accelerator else 256, context),
        batch_rows=16 if accelerator else 4,
    )


@dataclass(frozen=True)
class Rates:
    """What was measured on this device before anything began. Tokens are those of prompts with their replies."""

    reply_tokens: float  # per second, of replying
    training_tokens: float  # per second
    update_seconds: float
    reply_memory: int  # bytes
    training_memory: int  # bytes
    drafter_bytes: int  # of its weights

    def affordable(self, seconds: float, passes: int) -> float:
        """Tokens that can be replied with and then be learned from in `passes` passes."""
        return seconds / (1 / self.reply_tokens + passes / self.training_tokens)


def fit_to_time(
    recipe: Recipe, rates: Rates, prompt_lengths: Iterable[int], seconds: float
) -> tuple[Recipe, list[int]]:
    """`recipe` for as many prompts, in order, as there is time for, and their lengths; no more of them is looked at.

    Snapshots are made about once a minute.
    """
    room = rates.affordable(seconds, recipe.passes)
    taken: list[int] = []
    for length in prompt_lengths:
        room -= reply_length(recipe, length)
        if room < 0 and len(taken) >= least_prompts(recipe):
            break
        taken.append(length)
    fitted = replace(
        recipe,
        prompts=len(taken),
        save_every=max(min(500, int(60 / rates.update_seconds)), 1),
        log_every=max(min(20, int(5 / rates.update_seconds)), 1),
    )
    return fitted, taken


def reply_length(recipe: Recipe, prompt: int) -> float:
    """Tokens that a prompt of so many tokens is taken to have with its reply."""
    return prompt + REPLY_SHARE * recipe.replies.new_tokens


def least_prompts(recipe: Recipe) -> int:
    """Prompts below which there would be no batch to learn from: a batch of replies, or some rows of text."""
    rows = batch_rows(recipe.replies.batch_tokens, recipe.replies.lengths[0] + recipe.replies.new_tokens)
    return max(rows, 2 * recipe.batch_rows * recipe.row_length // recipe.replies.new_tokens)
