"""Streaming: the pieces are the generation, text is given as late as it must and no later, stop strings, cancelling."""

import pytest

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode import speculative
from dvi_jax.decode.generate import generate
from dvi_jax.decode.stream import Stream
from dvi_jax.errors import UserError

SETTINGS = DecodeConfig(3, 0.0, 48)


def encode(model, *texts):
    return [model.tokenizer.encode(text) for text in texts]


def collect(stream):
    """Ids, text and finish reason of each row, put together from its pieces; nothing comes after the reason."""
    rows = {}
    for pieces in stream:
        for piece in pieces:
            ids, text, reason = rows.get(piece.row, ([], "", None))
            assert reason is None
            assert piece.ids or piece.text or piece.finish_reason
            rows[piece.row] = (ids + piece.ids, text + piece.text, piece.finish_reason)
    return [rows[row] for row in sorted(rows)]


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("eos_ids", [(), None])
def test_pieces_are_the_generation(reciter, mumbler, every, eos_ids):
    """With good and bad drafts, one with its own end (the eos follows the last letter)."""
    for model in (reciter, mumbler):
        prompts = encode(model, "a", "c")
        expected, _ = generate(model, prompts, SETTINGS, eos_ids=eos_ids)
        stream = Stream(model, prompts, SETTINGS, eos_ids=eos_ids, every=every)
        rows = collect(stream)
        assert stream.generations == expected
        assert rows == [(g.new_ids, model.tokenizer.decode(g.new_ids), g.finish_reason) for g in expected]
        assert rows[1][1].startswith("😀defghij")
        assert [row[2] for row in rows] == (["length"] * 2 if eos_ids == () else ["eos"] * 2)


def test_text_comes_in_whole_characters(mumbler):
    """One token, one byte, every round: a character comes with its last byte, a cut one at the end as it is."""
    stream = Stream(mumbler, encode(mumbler, "b", "c"), SETTINGS, every=1)
    pieces = [piece for pieces in stream for piece in pieces if piece.row == 0]
    assert [piece.text for piece in pieces[:9]] == ["", "", "€", "c", "", "", "", "😀", "d"]
    assert [len(piece.ids) for piece in pieces] == [1] * len(pieces)
    first, second = collect(Stream(mumbler, encode(mumbler, "b", "c"), DecodeConfig(3, 0.0, 6), every=1))
    assert first[1:] == ("€c\ufffd", "length")
    assert second[1:] == ("😀de", "length")


# Rows go on from "a" with "é b€c😀defghij" and from "c" with "😀defghij"; one byte is one token.
STOPS = {
    "over two tokens": ((" b",), ("é", 4, "stop"), ("😀defghij", 12, "eos")),
    "inside a character's bytes": (("€",), ("é b", 7, "stop"), ("😀defghij", 12, "eos")),
    "at the very start": (("😀", "é"), ("", 2, "stop"), ("", 4, "stop")),
    "one for each row": (("€c", "gh"), ("é b", 8, "stop"), ("😀def", 9, "stop")),
    "the first of two": (("fg", "de"), ("é b€c😀", 14, "stop"), ("😀", 6, "stop")),
    "one within the other": (("def", "e"), ("é b€c😀d", 14, "stop"), ("😀d", 6, "stop")),
    "never": (("zz", "ed"), ("é b€c😀defghij", 20, "eos"), ("😀defghij", 12, "eos")),
    "only its beginning": (("😀de!", "ijk"), ("é b€c😀defghij", 20, "eos"), ("😀defghij", 12, "eos")),
}


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("stops", "first", "second"), STOPS.values(), ids=STOPS.keys())
def test_stop_strings(reciter, mumbler, every, stops, first, second):
    """Text up to the first stop string, ids up to the token that completed it."""
    for model in (reciter, mumbler):
        prompts = encode(model, "a", "c")
        whole, _ = generate(model, prompts, SETTINGS)
        stream = Stream(model, prompts, SETTINGS, stop=stops, every=every)
        rows = collect(stream)
        for row, generation, full, (text, count, reason) in zip(
            rows, stream.generations, whole, (first, second), strict=True
        ):
            assert row == (full.new_ids[:count], text, reason)
            assert generation.new_ids == full.new_ids[:count]
            assert generation.output_ids == full.output_ids[: len(full.output_ids) - len(full.new_ids) + count]
            assert generation.finish_reason == reason
            # Rounds up to the one that completed the string: it may have committed more.
            assert generation.accept_lengths == full.accept_lengths[: generation.rounds]
            assert sum(generation.accept_lengths[:-1]) < max(count - 1, 1) <= max(sum(generation.accept_lengths), 1)
            assert len(generation.drafted) == generation.rounds


def test_a_stop_string_that_is_the_first_token(mumbler):
    """No round was needed."""
    stream = Stream(mumbler, encode(mumbler, "d", "a"), SETTINGS, stop=["e"], every=1)
    assert collect(stream)[0] == (encode(mumbler, "e")[0], "", "stop")
    assert stream.generations[0].accept_lengths == []


def test_cancelling_leaves_the_model_usable(reciter):
    prompts = encode(reciter, "a", "c")
    before, _ = generate(reciter, prompts, SETTINGS)
    iterator = iter(Stream(reciter, prompts, SETTINGS, every=1))
    assert [piece.ids for piece in next(iterator)] == [generation.new_ids[:1] for generation in before]
    next(iterator)
    iterator.close()
    assert list(iterator) == []
    assert generate(reciter, prompts, SETTINGS)[0] == before
    stream = Stream(reciter, prompts, SETTINGS, every=1)
    collect(stream)
    assert stream.generations == before


def test_sampled_stream(make_close):
    """Without a tokenizer: ids alone."""
    model, prompts = make_close(), [[5, 9, 2], [40] * 9, [7]]
    settings, options = DecodeConfig(3, 0.0, 30), {"sampling": SamplingConfig(temperature=1.2, seed=9), "eos_ids": ()}
    expected, _ = generate(model, prompts, settings, **options)
    stream = Stream(model, prompts, settings, every=2, **options)
    assert collect(stream) == [(generation.new_ids, "", "length") for generation in expected]
    assert stream.generations == expected


def test_compiles_once(reciter, monkeypatch):
    """A batch size of its own: one trace for a generation and for streams of any stretch, plain ones too."""
    traces, original = [], speculative.speculative_round

    def counting(*args):
        traces.append(1)
        return original(*args)

    monkeypatch.setattr(speculative, "speculative_round", counting)
    prompts = encode(reciter, "a", "b", "c", "d", "e")
    generate(reciter, prompts, SETTINGS)
    for every in (1, 2, 50):
        collect(Stream(reciter, prompts, SETTINGS, every=every, stop=["gh"]))
    collect(Stream(reciter, prompts, SETTINGS, plain=True, eos_ids=()))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every 1 or more rounds, got 0"), ({"stop": [""]}, "stop string must not be empty")],
)
def test_bad_streams(reciter, options, message):
    with pytest.raises(UserError, match=message):
        Stream(reciter, encode(reciter, "a"), SETTINGS, **options)
    with pytest.raises(UserError, match="at least one prompt"):
        Stream(reciter, [], SETTINGS)


def test_stop_strings_need_a_tokenizer(make_close):
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        Stream(make_close(), [[1]], SETTINGS, stop=["a"])
