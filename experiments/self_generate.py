"""The verifier's own replies to many prompts, as packed text for distillation.

    python -m experiments.self_generate --checkpoint CKPT --prompts prompts.npz --row-length 1024 --out replies.npz

Greedy replies are what a drafter has to predict at run time; text of other writers is further from it. Sampled ones
(`--temperature`) give a prompt many replies. `prompts.npz` holds `lengths` int32 [N] and `ids`, all prompts end to end
(experiments/prompts.py writes it). Every row of the result holds whole prompts with their replies, so that no reply is
learned without what it answers; replies alone are marked.

Each batch is kept beside the result as soon as it is done (`replies.npz.batches/`), until the result is written: the
same command goes on where it was killed or ran out of `--max-seconds`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi_jax.archives import DAMAGED_NPZ, read_npz
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.prefill import bucket
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.learn.packing import Packed
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load

MOST_SEQUENCES = 512  # of a batch: more gain nothing on one GPU


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together, filled up to a fixed size by repeating the first; only `count` are kept."""

    prompts: list[list[int]]
    count: int
    longest: int  # of its length class: fixes the shapes


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode batch by batch in random order, so that a run cut short by `--max-seconds` is a fair sample; save."""
    options = parse(arguments)
    enable_compilation_cache()
    model = load(options.checkpoint)
    prompts = read_prompts(options.prompts, options.limit)
    classes = by_length(prompts, options.lengths)
    too_long = len(prompts) - sum(map(len, classes.values()))
    print(f"{len(prompts) - too_long} prompts, {too_long} longer than {max(options.lengths)} tokens left out")
    batches = [
        batch
        for longest, prompts in classes.items()
        for batch in deal(prompts, longest, batch_rows(options.batch_tokens, longest + options.new_tokens))
    ]
    journal = Journal(options.out, purpose_of(model, batches, options))
    generate_missing(model, batches, journal, options)
    replies = [reply for batch in journal.kept() for reply in batch]
    packed = pack_whole(replies, options.row_length, model.config.vocab_size)
    packed.save(options.out)
    if len(journal) == len(batches):
        journal.clear()
    rows, share = len(packed.tokens), packed.mask.mean()
    print(f"{options.out}: {len(replies)} replies in {rows} rows of {options.row_length}, {share:.0%} reply tokens")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.self_generate", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=0, help="prompts to use, 0 for all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 384, 768, 1024], help="length classes")
    parser.add_argument("--batch-tokens", type=int, default=81920, help="prompt and reply positions of a batch")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy replies")
    parser.add_argument("--seed", type=int, default=0, help="of sampled replies")
    return parser.parse_args(arguments)


def purpose_of(model: LoadedModel, batches: Sequence[Batch], options: argparse.Namespace) -> str:
    """All that the replies depend on."""
    seed = options.seed if options.temperature else None
    return repr(
        (model.manifest.base_sha256, model.manifest.dtype, batches, options.new_tokens, options.temperature, seed)
    )


Reply = tuple[list[int], int]  # token ids of a prompt with its reply, and how many are the prompt's


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


def generate_missing(
    model: LoadedModel, batches: Sequence[Batch], journal: Journal, options: argparse.Namespace
) -> None:
    """Decode what the journal lacks, until `max_seconds` are over."""
    settings = DecodeConfig(draft_steps=0, max_new_tokens=options.new_tokens)
    new_tokens, began = 0, time.perf_counter()
    for done, index in enumerate(np.random.default_rng(0).permutation(len(batches)), 1):
        if index in journal:
            continue
        batch = batches[index]
        # Every batch has a seed of its own, so that a run that goes on gives what one run would have given.
        seed = (options.seed + int(index) * MOST_SEQUENCES) % 2**32
        sampling = SamplingConfig(temperature=options.temperature, seed=seed) if options.temperature else None
        generations, _ = generate_batch(
            model, batch.prompts, settings, plain=True, sampling=sampling, longest_prompt=batch.longest
        )
        replies = [(g.output_ids, len(p)) for p, g in zip(batch.prompts[: batch.count], generations, strict=False)]
        journal.add(int(index), replies)
        new_tokens += sum(len(ids) - count for ids, count in replies)
        seconds = time.perf_counter() - began
        print(f"{done} of {len(batches)} batches, {new_tokens} tokens, {seconds:.0f} s", flush=True)
        if seconds > options.max_seconds:
            return


def read_prompts(path: str, limit: int) -> list[list[int]]:
    """The first `limit` prompts (0: all) as token ids."""
    try:
        arrays = read_npz(path, "lengths", "ids")
    except DAMAGED_NPZ as error:
        raise UserError(f"{path} does not hold prompts (.npz with lengths and ids): {error}") from error
    lengths, ids = arrays["lengths"], arrays["ids"]
    whole = all(array.ndim == 1 and array.size and array.dtype.kind in "iu" for array in (lengths, ids))
    if not whole or lengths.min() < 1 or lengths.sum() != len(ids) or ids.min() < 0:
        raise UserError(f"{path} does not hold prompts: lengths of 1 or more must add up to the number of ids")
    prompts = np.split(ids, np.cumsum(lengths)[:-1])
    return [prompt.tolist() for prompt in (prompts[:limit] if limit else prompts)]


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


if __name__ == "__main__":
    sys.exit(run_cli(main))
