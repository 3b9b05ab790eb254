"""Token sequences packed end to end into rows of one length, with a mask of the tokens to learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvi_jax.archives import DAMAGED_NPZ, Header, read_npz
from dvi_jax.errors import UserError, one_line


@dataclass(frozen=True)
class Packed:
    """N rows of T tokens. Sequences follow each other without padding, so one may go on in the next row."""

    tokens: np.ndarray  # uint16 or int32 [N, T]
    mask: np.ndarray  # bool [N, T], tokens an assistant wrote

    def batches(self, rows: int, seed: int, skip: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless batches of `rows` rows, reshuffled every epoch by `seed`, from batch number `skip` on."""
        per_epoch = len(self.tokens) // rows
        if not per_epoch:
            raise UserError(f"the packed data has {len(self.tokens)} rows, fewer than a batch of {rows}")
        number = skip
        while True:
            epoch, index = divmod(number, per_epoch)
            order = np.random.default_rng((seed, epoch)).permutation(len(self.tokens))
            chosen = order[index * rows : (index + 1) * rows]
            yield self.tokens[chosen].astype(np.int32), self.mask[chosen]
            number += 1

    def hold_out(self, rows: int) -> tuple[Packed, Packed]:
        """(rows to learn from, the last `rows`): copies of a held-out row, in a file given twice, are left out."""
        last = {row.tobytes() for row in self.tokens[-rows:]}
        others = np.array([row.tobytes() not in last for row in self.tokens], bool)
        return Packed(self.tokens[others], self.mask[others]), Packed(self.tokens[-rows:], self.mask[-rows:])

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, tokens=self.tokens, mask=np.packbits(self.mask, axis=1))

    def frequent_tokens(self, most: int) -> tuple[np.ndarray, float]:
        """Ids of the most frequent tokens that an assistant wrote, at most so many, and their share of all these."""
        counts = np.bincount(self.tokens[self.mask])
        chosen = np.argsort(-counts, kind="stable")[:most]
        chosen = chosen[counts[chosen] > 0]
        return np.sort(chosen), float(counts[chosen].sum() / max(counts.sum(), 1))


def pack(sequences: Iterable[tuple[Sequence[int], Sequence[bool]]], row_length: int, vocab_size: int) -> Packed:
    """Pack (ids, mask) pairs; the last, incomplete row is left out."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    ids, masks = [], []
    for sequence, marks in sequences:
        ids.append(np.asarray(sequence, dtype))
        masks.append(np.asarray(marks, bool))
    tokens, mask = np.concatenate(ids or [np.zeros(0, dtype)]), np.concatenate(masks or [np.zeros(0, bool)])
    rows = len(tokens) // row_length
    if not rows:
        raise UserError(f"the data has {len(tokens)} tokens, not enough for one row of {row_length}")
    whole = rows * row_length
    return Packed(tokens[:whole].reshape(rows, row_length), mask[:whole].reshape(rows, row_length))


def load_packed(paths: Sequence[str | Path]) -> Packed:
    """Read what `Packed.save` wrote; several files of one row length are joined."""
    parts = [_load(path) for path in paths]
    lengths = {tokens.shape[1] for tokens, _ in parts}
    if len(lengths) != 1:
        raise UserError(f"packed files of one row length are needed, got lengths {sorted(lengths)}")
    return Packed(np.concatenate([t for t, _ in parts]), np.concatenate([m for _, m in parts]))


def _load(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, both [N, T], of one file."""
    wrong = f"{path} is not packed data (.npz with tokens and mask)"

    def expect(headers: dict[str, Header]) -> None:
        (shape, dtype), (bits_shape, bits_dtype) = headers["tokens"], headers["mask"]
        if len(shape) != 2 or 0 in shape or dtype.kind not in "iu":
            raise UserError(f"{wrong}: tokens must be rows of ids, got {dtype} {list(shape)}")
        if bits_dtype != np.uint8 or bits_shape != (shape[0], -(-shape[1] // 8)):
            raise UserError(f"{wrong}: the mask must have a bit for each token, got {bits_dtype} {list(bits_shape)}")

    try:
        arrays = read_npz(path, "tokens", "mask", expect=expect)
    except DAMAGED_NPZ as error:
        raise UserError(one_line(f"{wrong}: {error}")) from error
    tokens, bits = arrays["tokens"], arrays["mask"]
    if tokens.min() < 0:
        raise UserError(f"{wrong}: tokens must be rows of ids, got {tokens.min()}")
    return tokens, np.unpackbits(bits, axis=1, count=tokens.shape[1]).astype(bool)
