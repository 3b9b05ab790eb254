"""Settings of online learning compared on recorded traffic: decoded once, learned from again and again.

    python -m experiments.recorded --config experiments/configs/domain_shift.yaml --out FILE.json \\
        --variant optimizer.lora_lr=1e-4 optimizer.head_lr=1e-4 --variant optimizer.average=0.9 [--seeds N] \\
        [--solve-first N]

Decoding is lossless, so which tokens a reply has does not depend on the drafter. The frozen drafter decodes the
config's prompts; then every variant goes through these rollouts in order, each judged with the drafter learned so far
before it is learned from, as in a run. Judged are the drafts of a round that begins at every token of a reply, by
teacher forcing: several times the drafts that a run's own rounds judge, and the same ones for every variant. So a
change against the frozen drafter has a small standard error, which is over prompts. With `--solve-first` a new
drafter's first weights are solved from so many replies, as a server does it, and updates begin behind them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.checkpoint import rewrite_checkpoint
from dvi_jax.config import TrainConfig
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.fast_update import Trainable, with_trainable
from dvi_jax.learn.first_weights import NormalEquations, added, solved
from dvi_jax.learn.online import OnlineRun
from dvi_jax.learn.replay import Windows, push
from dvi_jax.loading import enable_compilation_cache
from dvi_jax.model.speculative_llama import Definition, Params, join
from dvi_jax.trained_parts import with_drafter_from
from experiments.learning_cost import opened
from experiments.measure import environment, write_result
from experiments.objectives import online_config
from experiments.objectives import recorded as settings_of_run

# What a variant may change.
OF_LEARNING = (
    *("update_every", "updates_per_rollout", "fresh_windows", "replayed_windows", "positions_per_update"),
    *("replay_capacity", "objective", "optimizer", "seed"),
)


class Rollout(NamedTuple):
    """One recorded rollout of N prompts."""

    windows: Windows  # on the host
    files: tuple[int, ...]  # [N], which of the config's files each prompt is from


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, and go through the record with each variant; results are on the disk after every one."""
    parser = ArgumentParser(prog="python -m experiments.recorded", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--variant", action="append", nargs="+", required=True, metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument("--drafter-from", metavar="DIR", help="a directory whose trained drafter to begin with")
    parser.add_argument(
        "--solve-first", type=at_least_one, metavar="N", help="replies that give a new drafter its first weights"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    enable_compilation_cache()
    base, *variants = (online_config(options.config, [*options.set, *more]) for more in ([], *options.variant))
    for config in variants:
        check_variant(config, base)
    with tempfile.TemporaryDirectory() as scratch:
        if options.drafter_from is not None:
            warm = Path(scratch) / Path(options.drafter_from).name
            rewrite_checkpoint(with_drafter_from(open_checkpoint(base.checkpoint), options.drafter_from), warm)
            base = replace(base, checkpoint=str(warm))
        return compare_variants(base, variants, options)


def check_variant(config: TrainConfig, base: TrainConfig) -> None:
    """Raise `UserError` for a variant that would decode something else, or learn from the frozen drafter's choices."""
    if replace(config, **{name: getattr(base, name) for name in OF_LEARNING}) != base:
        raise UserError(f"a variant may set {', '.join(OF_LEARNING)} and nothing else: the record has the rest")
    if config.objective.pg_max or not config.updates_per_rollout:
        raise UserError("a variant needs objective.pg_max=0 (drafts are the frozen drafter's) and updates to make")


def compare_variants(base: TrainConfig, variants: list[TrainConfig], options: argparse.Namespace) -> int:
    """Every variant against the drafter that learns nothing, by domain."""
    began = time.perf_counter()
    with opened(Recorder, base) as run:
        rollouts = run.record()
        files = np.array([file for rollout in rollouts for file in rollout.files])
        domains = {Path(base.data.files[index]).stem: files == index for index in np.unique(files)}
        frozen = run.go_through(rollouts, replace(base, updates_per_rollout=0))
        rates = {domain: rate(frozen[inside]) for domain, inside in domains.items()}
        result: dict[str, Any] = {
            "environment": environment(),
            "settings": settings_of_run(base),
            "prompts": len(files),
            "solve_first": options.solve_first,
        }
        result |= {"seeds": options.seeds, "frozen": rates, "variants": []}
        told = ", ".join(f"{domain} {share:.1%}" for domain, share in rates.items())
        print(f"{time.perf_counter() - began:5.0f} s  frozen: {told}", flush=True)
        for given, config in zip(options.variant, variants, strict=True):
            learned = [
                run.go_through(rollouts, replace(config, seed=seed), solve_first=options.solve_first or 0)
                for seed in range(options.seeds)
            ]
            changes = {
                domain: change([counts[inside] for counts in learned], frozen[inside])
                for domain, inside in domains.items()
            }
            result["variants"].append({"set": given, "change": changes})
            write_result(options.out, result)
            told = ", ".join(
                f"{domain} {100 * by:+.2f} +- {100 * error:.2f}" for domain, (by, error) in changes.items()
            )
            print(f"{time.perf_counter() - began:5.0f} s  {' '.join(given)}: {told}", flush=True)
    return 0


add, solve = (jax.jit(work, static_argnames="definition") for work in (added, solved))


class Recorder(OnlineRun):
    """A run that decodes its prompts once, and then learns from these rollouts as often as one likes."""

    def record(self) -> list[Rollout]:
        """All rollouts of the run, with the drafter as it is."""
        cycles = self.config.prompts // (self.config.rollout_batch * self.config.update_every)
        rollouts = []
        for batch in itertools.chain.from_iterable(itertools.islice(self._cycles(), cycles)):
            windows, _ = self._roll_out(self.model, batch)
            rollouts.append(Rollout(jax.device_get(windows), tuple(prompt.position.file for prompt in batch)))
        return rollouts

    def go_through(self, rollouts: list[Rollout], config: TrainConfig, *, solve_first: int = 0) -> np.ndarray:
        """Judge every rollout and then learn from it with these settings: `count` of all prompts, [prompts, 2].

        From `solve_first` replies on; those give first weights, when a quarter, half and all of them are there.
        """
        self.config = config
        self.state = self._on_devices(self.initial_state(self.model.params))
        equations, due = NormalEquations.empty(self.model), [solve_first // 4, solve_first // 2, solve_first]
        counts: list[np.ndarray] = []
        for number, (windows, _) in enumerate(rollouts, 1):
            hits = right(
                self.model.definition,
                self.model.params,
                self.state.served,
                windows,
                drafts=config.decode.draft_steps,
                reply=config.decode.max_new_tokens,
            )
            counts.append(count(*jax.device_get((hits, windows.length - windows.prompt_length))))
            if equations is not None and solve_first > sum(map(len, counts[:-1])):
                equations = add(self.model.definition, self.model.params, equations, windows)
                if sum(map(len, counts)) >= due[0]:
                    due.pop(0)
                    drafter = solve(self.model.definition, self.model.params, equations)
                    self.state = self.state.replace(trainable=self.state.trainable | {"drafter": drafter})
            elif number % config.update_every == 0:
                self._learn_from(windows, [])
            self.state = self.state.replace(replay=push(self.state.replay, windows))
        return np.concatenate(counts)


@partial(jax.jit, static_argnames=("definition", "drafts", "reply"))
def right(
    definition: Definition, params: Params, trainable: Trainable, windows: Windows, *, drafts: int, reply: int
) -> jax.Array:
    """bool [N, reply, drafts]: whether draft j of a round that begins at token i of the reply is token i + j.

    Such a round has taken in the prompt and i tokens of the reply. Greedy replies; token 0 is the prefill's own.
    """
    model = join(definition, with_trainable(params, trainable))
    llama, tokens = model.llama, windows.tokens
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = llama.shallow(tokens, None, rows, adapted=model.separate_trunk)
    features = jax.tree.map(lambda x: x[:, 1:].astype(llama.dtype), windows.features)
    unrolled, found = model.drafter.unroll(hidden[:, :-1], features, rows[:, :-1], drafts), []
    for number in range(drafts):
        draft = unrolled[min(number, len(unrolled) - 1)]  # some drafters make all of a round's drafts alike
        position = windows.prompt_length[:, None] + jnp.arange(reply) + number
        row = jnp.clip(position - 1, 0, draft.shape[1] - 1)  # what predicts a position was computed at the row before
        draft_hidden = jnp.take_along_axis(draft, row[..., None], axis=1)
        logits = model.drafter.logits(draft_hidden, llama.head_weight())
        before = jnp.take_along_axis(tokens, row, axis=1)
        logits = llama.all_logits(model.drafter.corrected(logits, draft_hidden, before, llama.own_ids()))
        found.append(jnp.argmax(logits, axis=-1) == jnp.take_along_axis(tokens, row + 1, axis=1))
    return jnp.stack(found, axis=-1)


def count(hits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Drafts accepted and judged, int [N, 2], over every round that lies within a reply: `hits` as `right` gives them.

    `lengths`: tokens of each reply, int [N].
    """
    starts, drafts = np.arange(hits.shape[1]), hits.shape[2]
    inside = (starts >= 1) & (starts + drafts <= lengths[:, None])
    accepted = np.cumprod(hits, axis=2)
    judged = 1 + accepted[..., :-1].sum(axis=2)
    return np.stack([(values * inside).sum(axis=1) for values in (accepted.sum(axis=2), judged)], axis=1)


def rate(counts: np.ndarray) -> float:
    """Accept rate of prompts' counts [N, 2]."""
    accepted, judged = counts.sum(axis=0)
    return float(accepted / judged)


def change(learned: list[np.ndarray], frozen: np.ndarray) -> tuple[float, float]:
    """How the accept rate changed, the mean over seeds, and its standard error over prompts (the delta method)."""

    def deviations(counts: np.ndarray) -> np.ndarray:
        return (counts[:, 0] - rate(counts) * counts[:, 1]) / counts[:, 1].sum()

    by = np.mean([rate(counts) for counts in learned]) - rate(frozen)
    error = np.mean([deviations(counts) for counts in learned], axis=0) - deviations(frozen)
    return float(by), float(np.sqrt(np.sum(error**2)))


if __name__ == "__main__":
    sys.exit(run_cli(main))
