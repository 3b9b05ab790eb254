"""A model's own replies to many prompts, packed for distillation: what a drafter has to predict at run time.

Greedy replies are just that; sampled ones (`temperature`) give a prompt many replies. Rows of the result hold whole
prompts with their replies, so that no reply is learned without what it answers; replies alone are marked.

Each batch is kept beside the result as soon as it is done (`NAME.batches/`), until the result is written: the same
call goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi_jax.archives import read_npz
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.prefill import bucket
from dvi_jax.errors import UserError
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel

MOST_SEQUENCES = 512  # of a batch: more gain nothing on one GPU

Reply = tuple[list[int], int]  # token ids of a prompt with its reply, and how many are the prompt's


@dataclass(frozen=True, kw_only=True)
class ReplyConfig:
    """How replies are made."""

    lengths: tuple[int, ...] = (128, 384, 768, 1024)  # length classes of prompts, each with programs of its own
    new_tokens: int = 120  # of a reply at most
    batch_tokens: int = 81920  # prompt and reply positions of a batch
    temperature: float = 0.0  # 0: greedy replies
    seed: int = 0  # of sampled replies


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together, filled up to a fixed size by repeating the first; only `count` are kept."""

    prompts: list[list[int]]
    count: int
    longest: int  # of its length class: fixes the shapes


@dataclass(frozen=True)
class Progress:
    """How far the replies are."""

    batches: int  # done, those of earlier sittings included
    of: int
    new_tokens: int  # decoded in this sitting
    seconds: float


def make_replies(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    out: Path,
    config: ReplyConfig,
    row_length: int,
    *,
    max_seconds: float = float("inf"),
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Packed, int]:
    """Reply to the prompts (token ids; those longer than every class are left out), pack, and write `out`.

    Batches come in random order: what `max_seconds` cuts short is a fair sample, and goes on at the next call.
    Returns the rows and the number of replies in them.
    """
    batches = deal_all(prompts, config)
    journal = Journal(out, _purpose(model, batches, config))
    _generate_missing(model, batches, journal, config, max_seconds, report)
    replies = [reply for batch in journal.kept() for reply in batch]
    packed = pack_whole(replies, row_length, model.config.vocab_size)
    packed.save(out)
    if len(journal) == len(batches):
        journal.clear()
    return packed, len(replies)


def deal_all(prompts: Sequence[list[int]], config: ReplyConfig) -> list[Batch]:
    """The batches of all prompts that fit into a length class."""
    return [
        batch
        for longest, found in by_length(prompts, config.lengths).items()
        for batch in deal(found, longest, batch_rows(config.batch_tokens, longest + config.new_tokens))
    ]


class Journal:
    """Replies of finished batches, in a folder beside the result: a file appears whole or not at all."""

    def __init__(self, out: Path, purpose: str):
        """`purpose` names all that the replies depend on; what another one left is not used."""
        digest = hashlib.sha256(purpose.encode()).hexdigest()[:16]
        self.folder = out.with_name(f"{out.name}.batches")
        self.prefix = f"{digest}-"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._paths())

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def add(self, number: int, replies: Sequence[Reply]) -> None:
        """Keep what batch `number` gave."""
        partial = self.folder / f"partial-{os.getpid()}.npz"
        ids = np.concatenate([np.asarray(ids, np.int32) for ids, _ in replies])
        np.savez(partial, ids=ids, lengths=[len(ids) for ids, _ in replies], prompts=[count for _, count in replies])
        os.replace(partial, self._path(number))

    def kept(self) -> Iterator[list[Reply]]:
        """The replies of every batch that is there, in the order of their numbers."""
        for path in self._paths():
            arrays = read_npz(path, "ids", "lengths", "prompts")
            replies = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
            yield [(ids.tolist(), int(count)) for ids, count in zip(replies, arrays["prompts"], strict=True)]

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}{number:06}.npz"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.prefix}*.npz"))


def by_length(prompts: Sequence[list[int]], lengths: Sequence[int]) -> dict[int, list[list[int]]]:
    """Prompts by the smallest of `lengths` they fit into; those longer than all are left out."""
    classes: dict[int, list[list[int]]] = {longest: [] for longest in sorted(lengths)}
    for prompt in prompts:
        longest = next((length for length in classes if len(prompt) <= length), None)
        if longest is not None:
            classes[longest].append(prompt)
    if not any(classes.values()):
        raise UserError(f"no prompt has at most {max(lengths)} tokens: give --lengths up to the longest")
    return {longest: found for longest, found in classes.items() if found}


def batch_rows(tokens: int, length: int) -> int:
    """The largest power of two of rows of `length` within `tokens`, at most `MOST_SEQUENCES`."""
    return min(2 ** ((max(tokens // length, 1)).bit_length() - 1), MOST_SEQUENCES)


def deal(prompts: Sequence[list[int]], longest: int, rows: int) -> Iterator[Batch]:
    """Batches of `rows`, the longest prompts dealt out one to each: all batches of a class pad to the same length.

    Prompts are padded to the bucket of the longest beside them, and every other bucket is another program to compile.
    """
    rows = min(rows, bucket(len(prompts)))
    number = -(-len(prompts) // rows)
    ordered = sorted(prompts, key=len, reverse=True)
    for index in range(number):
        dealt = ordered[index::number]
        yield Batch(dealt + dealt[:1] * (rows - len(dealt)), len(dealt), longest)


def pack_whole(sequences: Sequence[Reply], row_length: int, vocab_size: int) -> Packed:
    """Rows of whole sequences (ids, prompt tokens); the rest of a row is filled with token 0, unmarked.

    Longest first, each into the fullest row that has room; then the rows are shuffled, so that the last ones, which a
    run holds out, are like the others. A sequence longer than a row loses its beginning.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]), reverse=True)
    tokens = np.zeros((len(sequences), row_length), np.uint16 if vocab_size <= 2**16 else np.int32)
    mask = np.zeros(tokens.shape, bool)
    free = np.full(len(sequences), row_length)
    for index in order:
        ids, prompt_length = sequences[index]
        prompt_length -= max(len(ids) - row_length, 0)
        ids = ids[-row_length:]
        row = int(np.argmin(np.where(free >= len(ids), free, row_length + 1)))
        begin = row_length - free[row]
        tokens[row, begin : begin + len(ids)] = ids
        mask[row, begin + max(prompt_length, 0) : begin + len(ids)] = True
        free[row] -= len(ids)
    used = np.random.default_rng(0).permutation(np.flatnonzero(free < row_length))
    return Packed(tokens[used], mask[used])


def _purpose(model: LoadedModel, batches: Sequence[Batch], config: ReplyConfig) -> str:
    """All that the replies depend on."""
    seed = config.seed if config.temperature else None
    return repr(
        (model.manifest.base_sha256, model.manifest.dtype, batches, config.new_tokens, config.temperature, seed)
    )


def _generate_missing(
    model: LoadedModel,
    batches: Sequence[Batch],
    journal: Journal,
    config: ReplyConfig,
    max_seconds: float,
    report: Callable[[Progress], None],
) -> None:
    """Decode what the journal lacks, until `max_seconds` are over."""
    settings = DecodeConfig(draft_steps=0, max_new_tokens=config.new_tokens)
    new_tokens, began = 0, time.perf_counter()
    for done, index in enumerate(np.random.default_rng(0).permutation(len(batches)), 1):
        if index in journal:
            continue
        batch = batches[index]
        # Every batch has a seed of its own, so that a run that goes on gives what one run would have given.
        seed = (config.seed + int(index) * MOST_SEQUENCES) % 2**32
        sampling = SamplingConfig(temperature=config.temperature, seed=seed) if config.temperature else None
        generations, _ = generate_batch(
            model, batch.prompts, settings, plain=True, sampling=sampling, longest_prompt=batch.longest
        )
        replies = [(g.output_ids, len(p)) for p, g in zip(batch.prompts[: batch.count], generations, strict=False)]
        journal.add(int(index), replies)
        new_tokens += sum(len(ids) - count for ids, count in replies)
        seconds = time.perf_counter() - began
        report(Progress(done, len(batches), new_tokens, seconds))
        if seconds > max_seconds:
            return
