"""A model's own replies to many prompts, packed for distillation: what a drafter has to predict at run time.

Greedy replies are just that; sampled ones (`temperature`) give a prompt many replies. Rows of the result hold whole
prompts with their replies, so that no reply is learned without what it answers; replies alone are marked.

An engine decodes them, every slot at work. Each batch of prompts is kept beside the result as soon as it is done
(`NAME.batches/`), until the result is written: the same call goes on where it was killed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dvi_jax.archives import read_npz
from dvi_jax.config import SamplingConfig
from dvi_jax.decode.batch import Generation
from dvi_jax.decode.plan import PLAIN
from dvi_jax.errors import UserError
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import replicas
from dvi_jax.processes import is_first, told
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.many import decode_many, open_engine
from dvi_jax.serve.requests import Request

MOST_SLOTS = 512  # more gain nothing on one GPU
MEASURED_TOKENS = 8  # of a reply, behind its first
RUN = 16  # batches that go through an engine one behind the other, before another length class may have its turn

Reply = tuple[list[int], int]  # token ids of a prompt with its reply, and how many are the prompt's


@dataclass(frozen=True, kw_only=True)
class ReplyConfig:
    """How replies are made."""

    lengths: tuple[int, ...] = (128, 384, 768, 1024)  # length classes of prompts, each with an engine of its own
    new_tokens: int = 120  # of a reply at most
    batch_tokens: int = 81920  # prompt and reply positions of all slots
    temperature: float = 0.0  # 0: greedy replies
    seed: int = 0  # of sampled replies


@dataclass(frozen=True)
class Batch:
    """Prompts that are kept together once they are replied to, as many as the engine has slots, or fewer."""

    prompts: list[list[int]]
    slots: int
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

    Runs of batches come in random order: what `max_seconds` cuts short is about a fair sample, and goes on at the next
    call.
    Returns the rows and the number of replies in them.
    """
    batches = deal_all(prompts, config)
    journal = Journal(out, _purpose(model, batches, config))
    _generate_missing(model, batches, journal, config, max_seconds, report)
    told(lambda: None)  # that no further engine is opened
    replies = [reply for batch in journal.kept() for reply in batch]
    packed = pack_whole(replies, row_length, model.config.vocab_size)
    packed.save(out)
    if len(journal) == len(batches):
        journal.clear()
    return packed, len(replies)


def follow_replies(model: LoadedModel, prompts: Sequence[list[int]], config: ReplyConfig) -> None:
    """In every process but the first of several: run the engines that `make_replies` opens there."""
    batches = deal_all(prompts, config)
    while (number := told(lambda: None)) is not None:
        with _open_engine(model, batches[number], config) as engine:
            engine.follow()


def deal_all(prompts: Sequence[list[int]], config: ReplyConfig) -> list[Batch]:
    """The batches of all prompts that fit into a length class."""
    return [
        batch
        for longest, found in by_length(prompts, config.lengths).items()
        for batch in deal(found, longest, batch_rows(config.batch_tokens, longest + config.new_tokens))
    ]


def measure(model: LoadedModel, batch: Batch, config: ReplyConfig) -> tuple[float, int]:
    """Seconds that replies as long as may be to a batch take, and the bytes of the engine: from their beginnings.

    Of several processes, which call it together, the first one knows the seconds.
    """
    rounds = min(MEASURED_TOKENS, config.new_tokens - 1)
    with _open_engine(model, batch, config) as engine:
        if not is_first():
            engine.follow()
            return float("nan"), engine.memory.total

        def timed(new_tokens: int) -> float:
            began = time.perf_counter()
            for _ in decode_many(engine, (Request(tuple(p), new_tokens, eos_ids=()) for p in batch.prompts)):
                pass
            return time.perf_counter() - began

        timed(1 + rounds)  # compiles
        seconds = prefill = timed(1)
        if rounds:
            seconds += (timed(1 + rounds) - prefill) * (config.new_tokens - 1) / rounds
        return seconds, engine.memory.total


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
    """The largest power of two of rows of `length` within `tokens`, at most `MOST_SLOTS`."""
    return min(2 ** ((max(tokens // length, 1)).bit_length() - 1), MOST_SLOTS)


def deal(prompts: Sequence[list[int]], longest: int, slots: int) -> Iterator[Batch]:
    """The prompts of a class in batches, in order; few prompts get few slots."""
    slots = min(slots, 1 << (len(prompts) - 1).bit_length())
    for begin in range(0, len(prompts), slots):
        yield Batch(list(prompts[begin : begin + slots]), slots, longest)


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
        (
            model.manifest.base_sha256,
            model.manifest.dtype,
            model.kv,
            batches,
            config.new_tokens,
            config.temperature,
            seed,
        )
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
    new_tokens, began = 0, time.perf_counter()
    for run in _runs(batches):
        missing = [index for index in run if index not in journal]
        for index, replies in _replies_to(model, missing, batches, config):
            journal.add(index, replies)
            new_tokens += sum(len(ids) - count for ids, count in replies)
            seconds = time.perf_counter() - began
            report(Progress(len(journal), len(batches), new_tokens, seconds))
            if seconds > max_seconds:
                return


def _runs(batches: Sequence[Batch]) -> list[list[int]]:
    """Numbers of batches, a few of one length class after the other, in random order."""
    runs = []
    for longest in dict.fromkeys(batch.longest for batch in batches):
        of_class = [index for index, batch in enumerate(batches) if batch.longest == longest]
        runs += [of_class[begin : begin + RUN] for begin in range(0, len(of_class), RUN)]
    return [runs[index] for index in np.random.default_rng(0).permutation(len(runs))]


def _replies_to(
    model: LoadedModel, numbers: Sequence[int], batches: Sequence[Batch], config: ReplyConfig
) -> Iterator[tuple[int, list[Reply]]]:
    """The replies to batches of one length class, which go through an engine together."""
    if not numbers:
        return
    told(lambda: numbers[0])
    chosen = [(index, batches[index].prompts) for index in numbers]
    requests = (
        _request(prompt, index, place, config) for index, prompts in chosen for place, prompt in enumerate(prompts)
    )
    with _open_engine(model, batches[numbers[0]], config) as engine:
        decoded = decode_many(engine, requests)
        for index, prompts in chosen:
            yield index, [_reply(one.generation) for one in itertools.islice(decoded, len(prompts))]


def _open_engine(model: LoadedModel, batch: Batch, config: ReplyConfig) -> Engine:
    """An engine for the batch's length class."""
    parts = replicas(model.definition.mesh)
    return open_engine(
        replace(model, tokenizer=None),  # no text is made of the replies
        slots=-(-batch.slots // parts) * parts,  # they divide among the devices
        context=batch.longest + config.new_tokens,
        longest_prompt=batch.longest,
        plan=str(PLAIN),
    )


def _request(prompt: list[int], batch: int, place: int, config: ReplyConfig) -> Request:
    """Every prompt has a seed of its own, so that a run that goes on gives what one run would have given."""
    sampling = None
    if config.temperature:
        seed = (config.seed + batch * MOST_SLOTS + place) % 2**32
        sampling = SamplingConfig(temperature=config.temperature, seed=seed)
    return Request(tuple(prompt), config.new_tokens, sampling)


def _reply(generation: Generation) -> Reply:
    return generation.output_ids, len(generation.output_ids) - len(generation.new_ids)
