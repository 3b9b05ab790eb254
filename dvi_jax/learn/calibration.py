"""Temperatures that make a drafter's confidence the share of its drafts that are right.

A drafter imitates the verifier's distribution; whether its first choice is the verifier's is another question, and
later drafts of a round are asked it only where those before them were right. So each draft of a round has a temperature
of its own, which divides its logits where a probability is wanted (temperature scaling and expected calibration error:
Guo et al., arXiv 1706.04599). The first choice stays what it is.

Letters: N rows of T tokens, M = N * T, J drafts of a round, G temperatures.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.errors import UserError
from dvi_jax.learn.distill import Rows, fold_chunks, unrolled_drafts, verify_text
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel
from dvi_jax.model.speculative_llama import Definition, Params, join

GRID = np.geomspace(0.3, 3.0, 17)  # [G]
BINS = 15  # of the expected calibration error, of equal width
LEAST = 1e-6  # probability that a logarithm is taken of
RESAMPLED = 2000  # texts that an interval is taken over


class Judged(NamedTuple):
    """One draft of a round, wherever those before it were right."""

    confidence: np.ndarray  # float32 [M', G], its probability at each temperature
    right: np.ndarray  # bool [M'], it is the verifier's token
    row: np.ndarray  # int [M'], of the text


def fit_temperatures(model: LoadedModel, text: Packed, steps: int, batch: int) -> tuple[float, ...]:
    """For each draft of a round, the temperature at which its confidence says best whether it is right.

    By mean log-likelihood over `text`, the verifier's own replies, `batch` rows at once. `UserError` where a draft is
    never judged.
    """
    found = []
    for number, judged in enumerate(judge(model, text, steps, GRID, batch)):
        if not len(judged.right):
            raise UserError(f"the text has no place where draft {number + 1} of a round is judged: give more of it")
        found.append(_lowest(judged))
    return tuple(found)


def judge(model: LoadedModel, text: Packed, steps: int, temperatures: np.ndarray, batch: int) -> list[Judged]:
    """Every draft of a round over the masked tokens of `text`, at `temperatures` float [G] for all or [J, G] for each.

    As many as `steps`, or as the drafter can tell apart.
    """
    rights, confidences, known = [], [], []
    for begin in range(0, len(text.tokens), batch):
        tokens, mask = (x[begin : begin + batch] for x in (text.tokens, text.mask))
        filled = [np.pad(x, ((0, batch - len(x)), (0, 0))) for x in (tokens.astype(np.int32), mask)]
        right, confidence = _drafts(
            model.definition, model.params, *filled, jnp.asarray(temperatures, jnp.float32), steps=steps
        )
        rights.append(np.asarray(right)[: len(tokens)])
        confidences.append(np.asarray(confidence)[: len(tokens)])
        known.append(np.pad(mask[:, 1:], ((0, 0), (0, 1))))  # row t predicts token t + 1
    right, confidence = np.concatenate(rights), np.concatenate(confidences)
    reached, judged = np.concatenate(known), []
    for number in range(right.shape[2]):
        judged.append(Judged(confidence[reached, number], right[reached, number], np.nonzero(reached)[0]))
        # A round goes on to the next draft, one token later, where this one was right.
        going_on = reached & right[..., number]
        reached = np.concatenate(known) & np.pad(going_on[:, :-1], ((0, 0), (1, 0)))
    return judged


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean |share that is right - mean confidence| over bins of confidence float [M'], weighted by what is in them."""
    gaps = np.bincount(_bins(confidence), weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / max(len(right), 1))


def error_by_chance(confidence: np.ndarray) -> float:
    """The error to be expected of so many drafts that are right with just these probabilities, each by itself.

    A bin's gap is then a sum of centred Bernoulli variables, nearly normal, whose mean size is sqrt(2 / pi) deviations.
    """
    variances = np.bincount(_bins(confidence), weights=confidence * (1 - confidence), minlength=BINS)
    return float(np.sqrt(2 / np.pi * variances).sum() / max(len(confidence), 1))


def error_interval(confidence: np.ndarray, right: np.ndarray, row: np.ndarray) -> tuple[float, float]:
    """Where 95% of the errors of texts lie that are made of rows drawn from this one's, with replacement.

    Whole rows, because drafts of one reply are right or wrong together. Drawing adds its own chance to that of the
    text, so the interval lies too high rather than too low.
    """
    if not len(right):
        return 0.0, 0.0
    rows, number = np.unique(row, return_inverse=True)
    flat = number * BINS + _bins(confidence)
    gaps = np.bincount(flat, weights=right - confidence, minlength=len(rows) * BINS).reshape(len(rows), BINS)
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLED)
    errors = np.abs(draws @ gaps).sum(axis=1) / (draws @ np.bincount(number))
    low, high = np.quantile(errors, (0.025, 0.975))
    return float(low), float(high)


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def _lowest(judged: Judged) -> float:
    """The temperature of the lowest mean negative log-likelihood: of the grid, then between its neighbours."""
    p = np.clip(judged.confidence, LEAST, 1 - LEAST)
    loss = -np.mean(np.where(judged.right[:, None], np.log(p), np.log1p(-p)), axis=0)
    best = int(np.clip(np.argmin(loss), 1, len(GRID) - 2))
    left, middle, right = loss[best - 1 : best + 2]
    bend = left - 2 * middle + right
    step = np.log(GRID[1] / GRID[0])
    offset = 0.5 * (left - right) / bend if bend > 0 else 0.0  # the vertex of a parabola
    return float(GRID[best] * np.exp(step * np.clip(offset, -1, 1)))


@partial(jax.jit, static_argnames=("definition", "steps"))
def _drafts(
    definition: Definition, params: Params, tokens: jax.Array, mask: jax.Array, temperatures: jax.Array, *, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Of every draft at every row: whether it is right, bool [N, T, J], and its probability, float32 [N, T, J, G]."""
    model = join(definition, params)
    verified = verify_text(model, tokens, mask)
    drafts = unrolled_drafts(model, verified, steps)
    total, count = drafts.shape[:2]
    inverse = jnp.broadcast_to(1 / temperatures, (count, temperatures.shape[-1]))

    def add(
        found: tuple[jax.Array, jax.Array], rows: Rows, drafts: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        top = jnp.argmax(model.llama.logits(rows.final), axis=-1)
        rights, confidences = [], []
        for j in range(count):
            logits = model.drafter.logits(drafts[:, j], model.draft_head())
            logits = model.drafter.corrected(logits, drafts[:, j], rows.own, model.draft_ids())
            best = jnp.max(logits, axis=-1)
            rights.append(model.draft_token(jnp.argmax(logits, axis=-1).astype(jnp.int32)) == top)
            logits -= best[:, None]
            confidences.append(jnp.stack([1 / jnp.sum(jnp.exp(logits * x), axis=-1) for x in inverse[j]], axis=-1))
        place = jnp.where(rows.weight > 0, index, total)  # a chunk may be filled up
        right, confidence = found
        right = right.at[place].set(jnp.stack(rights, axis=1), mode="drop")
        return right, confidence.at[place].set(jnp.stack(confidences, axis=1), mode="drop")

    nothing = jnp.zeros((total, count), bool), jnp.zeros((total, *inverse.shape), jnp.float32)
    right, confidence = fold_chunks(verified, drafts, add, nothing)
    return right.reshape(*tokens.shape, count), confidence.reshape(*tokens.shape, *inverse.shape)
