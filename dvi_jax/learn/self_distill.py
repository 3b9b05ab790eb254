"""A drafter for a model from a log of conversations alone: the model replies to the log's questions, the replies are
packed, and the drafter is distilled from them. Everything lies in one directory, and the same call goes on in it.

    recipe.json  replies.npz  metrics.jsonl  snapshots/  checkpoint/

Nothing is written before what it will take was measured: a batch of replies and an update, timed and counted.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from dvi_jax.checkpoint import Checkpoint
from dvi_jax.config import WHOLE_KV, DataConfig, DistillConfig, MeshConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import PromptStream
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.memory import available_bytes
from dvi_jax.directories import replace_file
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.distill import distill_step, init_distill, step_memory
from dvi_jax.learn.new_drafter import matching_or_new_drafter
from dvi_jax.learn.offline import OfflineResult, train_offline
from dvi_jax.learn.packing import load_packed
from dvi_jax.learn.recipe import Rates, Recipe, choose_recipe, fit_to_time, reply_length
from dvi_jax.learn.replies import Progress, deal_all, follow_replies, make_replies, measure
from dvi_jax.learn.run_directory import Report, lock
from dvi_jax.loading import LoadedModel, from_checkpoint, load
from dvi_jax.mesh import copied, make_mesh
from dvi_jax.processes import is_first, told, told_bytes
from dvi_jax.text_files import read_json

RECIPE, REPLIES = "recipe.json", "replies.npz"
MOST_PROMPTS = 200_000  # of a log; more would be days of replies
TIMED_UPDATES = 2


@dataclass(frozen=True)
class Estimate:
    """What a self-distillation will take. `prompts` of the log, `tokens` of them with their replies."""

    prompts: int
    tokens: int
    reply_seconds: float
    training_seconds: float
    reply_memory: int  # bytes
    training_memory: int  # bytes
    free_memory: int  # bytes
    disk: int  # bytes at most
    free_disk: int  # bytes


class SelfDistillation:
    """One directory's work: `prepare`, then `reply`, then `train`; each goes on where an earlier one stopped.

    Several processes do each step together; the first one has the directory, and tells the others what is in it.
    """

    def __init__(
        self,
        model: str,
        data: Sequence[str],
        out: str | Path,
        *,
        dtype: str | None = None,
        weights: str | None = None,
        kv: str = WHOLE_KV,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 - it cannot change
    ):
        """`model`, `dtype` and `weights` as of `open_checkpoint`; `data`: conversation files.

        `kv`: what the cache of replies keeps keys and values in (`config.KV`). `mesh`: the devices of this sitting;
        another one may have others. Raises `UserError` for bad ones.
        """
        self.kv, self.mesh = kv, mesh
        self.checkpoint: Checkpoint = open_checkpoint(model, dtype, weights, lazy=mesh.is_several)
        self.tokenizer = Tokenizer.from_checkpoint(self.checkpoint)
        self.data, self.out = tuple(data), Path(out)
        self._stream()
        self.recipe = self._kept_recipe()

    def prepare(self, minutes: float, passes: int | None = None) -> Estimate:
        """Measure, and choose a recipe that takes about so long. Raises `UserError` where it does not fit."""
        free = told(available_bytes)
        accelerator = jax.default_backend() != "cpu"
        config, dtype = self.checkpoint.config, self.checkpoint.manifest.dtype
        recipe = choose_recipe(config, dtype, free, kv=self.kv, accelerator=accelerator)
        recipe = recipe if passes is None else replace(recipe, passes=passes)
        next(self.prompts(recipe, 1), None)  # raises for a log that holds none, before minutes of measuring
        rates = self._measure(recipe)
        fitted = told(lambda: self._fitted(recipe, rates, minutes, free))
        self.recipe = Recipe.from_json(fitted["recipe"], "what was measured")
        return Estimate(**fitted["estimate"])

    def _fitted(self, recipe: Recipe, rates: Rates, minutes: float, free: int) -> dict[str, Any]:
        """The recipe and the estimate of a distillation of about so long, as JSON."""
        self.recipe, lengths = fit_to_time(recipe, rates, map(len, self.prompts(recipe, MOST_PROMPTS)), 60 * minutes)
        estimate = self._estimate(rates, lengths, free)
        for what, needed, there in (
            ("memory", max(estimate.reply_memory, estimate.training_memory), free),
            ("disk space", estimate.disk, estimate.free_disk),
        ):
            if needed > there:
                raise UserError(f"{needed / 2**30:.1f} GiB of {what} are needed, {there / 2**30:.1f} are free")
        return {"recipe": self.recipe.to_json(), "estimate": asdict(estimate)}

    def begin(self) -> None:
        """Keep the recipe in the directory: from here on it is what this directory goes on with."""
        if not is_first():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        document = self._made_for() | {"recipe": self._recipe().to_json()}
        replace_file(self.out / RECIPE, json.dumps(document, indent=1) + "\n")

    def reply(self, report: Callable[[Progress], None]) -> None:
        """Make the replies that are not there yet."""
        recipe, path = self._recipe(), self.out / REPLIES
        if told(path.exists):
            return
        model = from_checkpoint(self.checkpoint, kv=self.kv, mesh=make_mesh(self.mesh))
        prompts = list(self.prompts(recipe, recipe.prompts))
        if not is_first():
            follow_replies(model, prompts, recipe.replies)
            return
        partial = path.with_name(f".{REPLIES}")
        with lock(self.out):
            make_replies(model, prompts, partial, recipe.replies, recipe.row_length, report=report)
            os.replace(partial, path)

    def training(self) -> DistillConfig:
        """The settings of the training run on the replies."""
        path = self._replies
        rows = len(load_packed([path]).tokens)
        return self._recipe().training(str(self.checkpoint.path), str(self.out), str(path), rows, self.mesh)

    def train(self, report: Report) -> OfflineResult:
        """Distil from the replies."""
        result = train_offline(self.training(), resume=True, report=report)
        if jax.process_count() > 1:  # what comes next, the first one does alone, on one of its devices
            alone = is_first() and self.mesh.model == 1
            return replace(result, model=load(result.checkpoint, kv=self.kv)) if alone else result
        if self.mesh.data == 1:
            return replace(result, model=result.model.with_kv(self.kv))
        # One sequence at a time is what comes next, and that cannot be shared out.
        mesh = make_mesh(replace(self.mesh, data=1))
        return replace(result, model=load(result.checkpoint, kv=self.kv, mesh=mesh))

    def held_out_prompts(self, count: int) -> list[list[int]]:
        """Prompts of the log that were kept apart."""
        return [list(prompt.ids) for prompt in self._stream().held_out_prompts(count)]

    def prompts(self, recipe: Recipe, count: int) -> Iterator[list[int]]:
        """The first `count` prompts of the log that are short enough, of all turns, without the held-out ones."""
        stream = self._stream(max(recipe.replies.lengths))
        return (list(prompt.ids) for prompt in itertools.islice(stream, count))

    def _stream(self, longest: int = 128) -> PromptStream:
        settings = DataConfig(self.data, "all", longest)
        return PromptStream(ConversationStream(self.data), self.tokenizer, settings)

    def _recipe(self) -> Recipe:
        assert self.recipe is not None, "prepare comes first"
        return self.recipe

    def _made_for(self) -> dict[str, Any]:
        manifest = self.checkpoint.manifest
        return {
            "base_sha256": manifest.base_sha256,
            "dtype": manifest.dtype,
            "kv": self.kv,
            "data": list(self.data),
        }

    def _kept_recipe(self) -> Recipe | None:
        """The recipe of the directory; `UserError` if it is another model's or log's, or a folder of something else."""
        kept = told(self._read_recipe)
        return None if kept is None else Recipe.from_json(kept, str(self.out / RECIPE))

    def _read_recipe(self) -> Any:
        """As it stands there; None where nothing was begun."""
        path = self.out / RECIPE
        if not path.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise UserError(f"{self.out} already exists and is no distillation: choose another --out")
            return None
        document = read_json(path)
        if not isinstance(document, dict) or "recipe" not in document:
            raise UserError(f"{path} is damaged: it holds no recipe")
        given, begun = self._made_for(), {"kv": WHOLE_KV} | document  # earlier releases had no other
        for name, what in (
            ("base_sha256", "another model"),
            ("dtype", "another dtype"),
            ("kv", "another --kv"),
            ("data", "other data"),
        ):
            if begun.get(name) != given[name]:
                raise UserError(f"{self.out} was begun with {what}: name the same, or choose another --out")
        return document["recipe"]

    @cached_property
    def _replies(self) -> Path:
        """The file of replies, as this process has it: others than the first one hear what is in it."""
        path = self.out / REPLIES
        if jax.process_count() == 1:
            return path
        content = told_bytes(path.read_bytes() if is_first() else b"")
        if is_first():
            return path
        self._folder = TemporaryDirectory()  # for as long as this object is there
        heard = Path(self._folder.name) / REPLIES
        heard.write_bytes(content)
        return heard

    def _measure(self, recipe: Recipe) -> Rates:
        """Time and memory of a batch of replies and of an update, on this device."""
        new = matching_or_new_drafter(self.checkpoint, recipe.drafter, recipe.drafter_options, recipe.exit_layer)
        if recipe.draft_vocabulary and new.drafter is None:  # which tokens those will be does not matter here
            new = replace(new, draft_vocabulary=tuple(range(recipe.draft_vocabulary)))
        model = from_checkpoint(new, kv=self.kv, mesh=make_mesh(self.mesh))
        reply_rate, reply_memory = self._measure_replies(model, recipe)
        seconds, tokens, training_memory = self._measure_update(model, recipe)
        return Rates(
            reply_tokens=reply_rate,
            training_tokens=tokens / seconds,
            update_seconds=seconds,
            reply_memory=reply_memory,
            training_memory=training_memory,
            drafter_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params.drafter)),
        )

    def _measure_replies(self, model: LoadedModel, recipe: Recipe) -> tuple[float, int]:
        """Tokens of prompts and replies per second, and bytes, of a batch of the shortest class."""
        batch = deal_all(list(self.prompts(recipe, 1024)), recipe.replies)[0]
        seconds, memory = measure(model, batch, recipe.replies)
        return sum(reply_length(recipe, len(prompt)) for prompt in batch.prompts) / seconds, memory

    def _measure_update(self, model: LoadedModel, recipe: Recipe) -> tuple[float, int, int]:
        """Seconds, tokens and bytes of an update."""
        paths = str(self.checkpoint.path), str(self.out), str(self.out / REPLIES)
        config = recipe.training(*paths, 4 * recipe.batch_rows, self.mesh)
        shape = (config.batch_rows, config.row_length)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, model.config.vocab_size, shape, np.int32)
        mask = rng.random(shape) < 0.7
        state = copied(model.definition.mesh, init_distill(model.params, config))
        memory = step_memory(model.definition, model.params, state, tokens, mask, config=config)
        seconds = []
        for _ in range(1 + TIMED_UPDATES):
            began = time.perf_counter()
            state, values = distill_step(model.definition, model.params, state, tokens, mask, config=config)
            jax.block_until_ready((state, values))
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:]), tokens.size, memory

    def _estimate(self, rates: Rates, lengths: Sequence[int], free_memory: int) -> Estimate:
        recipe = self._recipe()
        tokens = sum(reply_length(recipe, length) for length in lengths)
        replies = 2 * 4 * int(tokens)  # batches as they come, then packed
        snapshots = 4 * 3 * rates.drafter_bytes  # weights and Adam's moments, one snapshot being written
        base = sum(leaf.nbytes for leaf in jax.tree.leaves(self.checkpoint.base))
        place = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        return Estimate(
            prompts=len(lengths),
            tokens=int(tokens),
            reply_seconds=tokens / rates.reply_tokens,
            training_seconds=recipe.passes * tokens / rates.training_tokens,
            reply_memory=rates.reply_memory,
            training_memory=rates.training_memory,
            free_memory=free_memory,
            disk=replies + snapshots + rates.drafter_bytes + base,
            free_disk=shutil.disk_usage(place).free,
        )
