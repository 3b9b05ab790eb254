"""Replies to distil from: how prompts are batched, how replies are packed, and that they are the model's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.errors import UserError
from dvi_jax.learn.packing import load_packed
from dvi_jax.learn.replies import batch_rows, by_length, deal, pack_whole
from dvi_jax.loading import load
from experiments.self_generate import main, read_prompts


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=40))
def test_rows_hold_whole_sequences(lengths):
    """Sequence n is the token n + 1 throughout: found once, in one piece, its reply marked."""
    row_length = 42
    sequences = [([n + 1] * (prompt + reply), prompt) for n, (prompt, reply) in enumerate(lengths)]
    packed = pack_whole(sequences, row_length, 100)
    assert packed.tokens.shape[1] == row_length
    for n, (prompt, reply) in enumerate(lengths):
        rows, columns = np.nonzero(packed.tokens == n + 1)
        assert len(set(rows)) == 1
        np.testing.assert_array_equal(columns, np.arange(columns[0], columns[0] + prompt + reply))
        np.testing.assert_array_equal(packed.mask[rows[0], columns], [False] * prompt + [True] * reply)
    assert not packed.mask[packed.tokens == 0].any()


def test_a_sequence_longer_than_a_row_loses_its_beginning():
    packed = pack_whole([(list(range(1, 13)), 8)], 6, 100)
    assert packed.tokens.tolist() == [[7, 8, 9, 10, 11, 12]]
    assert packed.mask.tolist() == [[False, False, True, True, True, True]]


def test_length_classes():
    prompts = [[1] * length for length in (3, 16, 17, 40, 64, 65)]
    classes = by_length(prompts, [64, 16])
    assert {longest: [len(p) for p in found] for longest, found in classes.items()} == {16: [3, 16], 64: [17, 40, 64]}
    with pytest.raises(UserError, match="no prompt has at most 2 tokens"):
        by_length(prompts, [2])


def test_batches_of_a_class_have_one_shape():
    """37 prompts, 8 a batch: every prompt once, in order; few prompts get few slots."""
    prompts = [[index] * (33 + index % 16) for index in range(37)]
    batches = list(deal(prompts, 64, 8))
    assert {(batch.slots, batch.longest) for batch in batches} == {(8, 64)}
    assert [prompt for batch in batches for prompt in batch.prompts] == prompts
    assert [len(batch.prompts) for batch in batches] == [8, 8, 8, 8, 5]
    assert [batch.slots for batch in deal(prompts[:3], 64, 8)] == [4]


def test_batch_rows():
    assert [batch_rows(81920, length) for length in (10, 248, 504, 1144, 100000)] == [512, 256, 128, 64, 1]


def test_replies_are_the_models_own(byte_checkpoint, tmp_path, capsys):
    """Against each prompt decoded alone."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 258, length) for length in (5, 9, 14, 7, 12, 20, 33)]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    np.savez_compressed(tmp_path / "prompts.npz", lengths=lengths, ids=np.concatenate(prompts).astype(np.uint16))
    out = tmp_path / "new" / "replies.npz"
    arguments = ["--checkpoint", str(byte_checkpoint), "--prompts", str(tmp_path / "prompts.npz"), "--out", str(out)]
    shapes = ["--lengths", "16", "--batch-tokens", "48", "--new-tokens", "8", "--row-length", "64"]
    assert main([*arguments, *shapes]) == 0
    assert "5 replies in 2 rows" in capsys.readouterr().out
    packed, model = load_packed([out]), load(byte_checkpoint)
    text = [packed.tokens[row].tolist() for row in range(len(packed.tokens))]
    marked = 0
    for prompt in prompts[:5]:
        (alone, _), _ = generate_batch(
            model, [prompt.tolist()] * 2, DecodeConfig(draft_steps=0, max_new_tokens=8), plain=True
        )
        row, begin = next(
            (row, begin)
            for row, ids in enumerate(text)
            for begin in range(len(ids))
            if ids[begin : begin + len(alone.output_ids)] == alone.output_ids
        )
        end = begin + len(alone.output_ids)
        assert packed.mask[row, begin:end].tolist() == [False] * len(prompt) + [True] * len(alone.new_ids)
        marked += len(alone.new_ids)
    assert packed.mask.sum() == marked


def test_a_run_that_was_cut_short_goes_on(byte_checkpoint, tmp_path, capsys):
    """Sampled replies: in two sittings they are those of one."""
    prompts = [[5, 9, 11], [7, 8], [4, 4, 30, 2], [60, 61]]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    np.savez(tmp_path / "prompts.npz", lengths=lengths, ids=np.concatenate(prompts).astype(np.uint16))
    arguments = ["--checkpoint", str(byte_checkpoint), "--prompts", str(tmp_path / "prompts.npz"), "--lengths", "16"]
    arguments += ["--batch-tokens", "24", "--new-tokens", "8", "--row-length", "16", "--temperature", "1"]
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    assert main([*arguments, "--out", str(whole)]) == 0
    assert main([*arguments, "--out", str(cut), "--max-seconds", "0"]) == 0
    assert len(load_packed([cut]).tokens) < len(load_packed([whole]).tokens)
    capsys.readouterr()
    assert main([*arguments, "--out", str(cut)]) == 0
    assert capsys.readouterr().out.count(" batches, ") == 3  # of four: the first was kept
    np.testing.assert_array_equal(load_packed([cut]).tokens, load_packed([whole]).tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "prompts.npz", "whole.npz"]
    other = tmp_path / "other.npz"
    assert main([*arguments, "--seed", "1", "--out", str(other)]) == 0
    assert not np.array_equal(load_packed([other]).tokens, load_packed([whole]).tokens)


def test_a_file_without_prompts(byte_checkpoint, tmp_path):
    np.savez(tmp_path / "text.npz", tokens=np.zeros((1, 4)))
    with pytest.raises(UserError, match="does not hold prompts"):
        main(["--checkpoint", str(byte_checkpoint), "--prompts", str(tmp_path / "text.npz"), "--out", "never.npz"])


@pytest.mark.parametrize(
    ("lengths", "ids"),
    [([2, 2], [1, 2, 3]), ([3, 0], [1, 2, 3]), ([], []), ([1.0], [1.0]), ([2], [1, -1]), ([[1]], [1])],
)
def test_prompts_whose_lengths_do_not_fit_are_refused(tmp_path, lengths, ids):
    np.savez(tmp_path / "x.npz", lengths=np.array(lengths), ids=np.array(ids))
    with pytest.raises(UserError, match=r"x\.npz does not hold prompts: lengths of 1 or more must add up"):
        read_prompts(tmp_path / "x.npz", 0)
    np.savez(tmp_path / "x.npz", lengths=np.array([2, 1]), ids=np.array([5, 6, 7]))
    assert read_prompts(tmp_path / "x.npz", 0) == [[5, 6], [7]]
    assert read_prompts(tmp_path / "x.npz", 1) == [[5, 6]]
