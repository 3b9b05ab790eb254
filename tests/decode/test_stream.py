"""Streaming: the pieces are the generation, text is given as late as it must and no later, stop strings, cancelling."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode import speculative
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.prefix import make_prefix
from dvi_jax.decode.stream import Stream, StreamedText
from dvi_jax.errors import UserError
from dvi_jax.importing.sentencepiece_build import Normalization, sentencepiece_bpe
from dvi_jax.importing.tokenizer_build import CONTROL, NORMAL, UNKNOWN, Vocabulary

SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=48)


def encode(model, *texts):
    return [model.tokenizer.encode(text) for text in texts]


def collect(stream):
    """Ids, text and finish reason of each row, put together from its pieces; nothing comes after the reason."""
    rows = {}
    for pieces in stream:
        for piece in pieces:
            ids, text, reason = rows.get(piece.sequence, ([], "", None))
            assert reason is None
            assert piece.ids or piece.text or piece.finish_reason
            rows[piece.sequence] = (ids + piece.ids, text + piece.text, piece.finish_reason)
    return [rows[row] for row in sorted(rows)]


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("eos_ids", [(), None])
def test_pieces_are_the_generation(reciter, mumbler, every, eos_ids):
    """With good and bad drafts, one with its own end (the eos follows the last letter)."""
    for model in (reciter, mumbler):
        prompts = encode(model, "a", "c")
        expected, _ = generate_batch(model, prompts, SETTINGS, eos_ids=eos_ids)
        stream = Stream(model, prompts, SETTINGS, eos_ids=eos_ids, every=every)
        rows = collect(stream)
        assert stream.generations == expected
        assert rows == [(g.new_ids, model.tokenizer.decode(g.new_ids), g.finish_reason) for g in expected]
        assert rows[1][1].startswith("😀defghij")
        assert [row[2] for row in rows] == (["length"] * 2 if eos_ids == () else ["eos"] * 2)


def test_text_comes_in_whole_characters(mumbler):
    """One token, one byte, every round: a character comes with its last byte, a cut one at the end as it is."""
    stream = Stream(mumbler, encode(mumbler, "b", "c"), SETTINGS, every=1)
    pieces = [piece for pieces in stream for piece in pieces if piece.sequence == 0]
    assert [piece.text for piece in pieces[:9]] == ["", "", "€", "c", "", "", "", "😀", "d"]
    assert [len(piece.ids) for piece in pieces] == [1] * len(pieces)
    unstopped = collect(Stream(mumbler, encode(mumbler, "b", "c"), SETTINGS, every=1, stop=["\ufffd"]))
    assert [row[1:] for row in unstopped] == [("€c😀defghij", "eos"), ("😀defghij", "eos")]
    first, second = collect(
        Stream(mumbler, encode(mumbler, "b", "c"), DecodeConfig(draft_steps=3, max_new_tokens=6), every=1)
    )
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
        whole, _ = generate_batch(model, prompts, SETTINGS)
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


def test_a_special_token_as_stop_string(reciter):
    """It is no text, so its id stops; where it ends the row anyway, the reason stays the eos."""
    prompts = encode(reciter, "a", "c")
    whole, _ = generate_batch(reciter, prompts, SETTINGS, eos_ids=())
    stream = Stream(reciter, prompts, SETTINGS, eos_ids=(), stop=["<|im_end|>", "<|im_start|>", "zz"])
    expected = [("é b€c😀defghij", 20), ("😀defghij", 12)]
    rows = [(full.new_ids[:count], text, "stop") for full, (text, count) in zip(whole, expected, strict=True)]
    assert [row[0][-1] for row in rows] == [1, 1]
    assert collect(stream) == rows
    assert [(made.new_ids, made.finish_reason) for made in stream.generations] == [(row[0], row[2]) for row in rows]
    ended = collect(Stream(reciter, prompts, SETTINGS, stop=["<|im_end|>"]))
    assert ended == [(ids, text, "eos") for ids, text, _ in rows]


def byte_level(tokenizer_json):
    """One byte an id, and some that begin or end within a character."""
    (mapped, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é€😀 €ab")
    description = json.loads(tokenizer_json)
    vocabulary = description["model"]["vocab"]
    for start in range(len(mapped) - 4):
        for size in (2, 3, 4):
            vocabulary.setdefault(mapped[start : start + size], len(vocabulary))
    return json.dumps(description)


def sentencepiece(_):
    """Spaces as U+2581, one of which is dropped at the beginning, and bytes for what has no piece (as in Llama 2)."""
    pieces = ["▁", "▁▁", "a", "b", "▁a", "▁b", "é", "ab", "\ufffd"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * len(pieces)]
    return sentencepiece_bpe(Vocabulary(tokens, kinds), [0.0] * len(tokens), Normalization())


def words(decoder):
    """No bytes: whole words, put together by this decoder of the library."""

    def build(_):
        tokens = ["<unk>", "</s>", "▁a", "▁", "b", "é", "##a", "\ufffd"]
        tokenizer = tokenizers.Tokenizer(models.WordLevel({text: index for index, text in enumerate(tokens)}, "<unk>"))
        tokenizer.add_special_tokens(["</s>"])
        if decoder is not None:
            tokenizer.decoder = decoder
        return tokenizer.to_str()

    return build


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": words(decoders.Metaspace()),
    "word pieces": words(decoders.WordPiece(cleanup=False)),
    "no decoder": words(None),
}
# Indices of what `samples` gives, taken modulo its length; and where the ids are cut into pieces.
SAMPLES = st.lists(st.integers(0, 10**4), max_size=30)
CUTS = st.lists(st.integers(0, 60), max_size=8)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def tokenizer(request, tokenizer_json):
    return Tokenizer(request.param(tokenizer_json))


def is_byte(tokenizer, token):
    """Of the tokenizer with byte fallback: whatever may follow can spoil it."""
    return tokenizer.token_id("<0x00>") is not None and 3 <= token < 259


def ids_of(tokenizer, samples):
    """A third characters whole, a third marks and unknown ids, a third any id."""
    texts = [tokenizer.encode(text) for text in ("€", "😀", "é", "\n", " a", "b")]
    texts = [[token for token in ids if is_byte(tokenizer, token)] or ids for ids in texts]
    marks = [[token] for token in (-1, 0, 1, 2, tokenizer.vocab_size)]
    kinds = (texts, marks, [[token] for token in range(tokenizer.vocab_size)])
    ids = []
    for sample in samples:
        kind, which = kinds[sample % 3], sample // 3
        ids += kind[which % len(kind)]
    return ids


def in_pieces(ids, cuts):
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    return [ids[start:end] for start, end in pairwise(edges)] or [[]]


@settings(deadline=None)
@given(samples=SAMPLES, cuts=CUTS)
@example(samples=[3, 1], cuts=[4])  # a character of four bytes, then nothing new
@example(samples=[3, 3], cuts=[1, 2, 3, 4, 5, 6, 7])
def test_text_is_that_of_decoding_all(tokenizer, samples, cuts):
    ids = ids_of(tokenizer, samples)
    text, seen, count = StreamedText(tokenizer), "", 0
    for piece in (pieces := in_pieces(ids, cuts)):
        count += len(piece)
        counted, new = text.add(piece, last=piece is pieces[-1])
        seen += new
        assert counted == len(piece)
        so_far, newest = tokenizer.decode(ids[:count]), ids[count - 1] if piece else -1
        may_change = so_far.endswith("\ufffd") or is_byte(tokenizer, newest)
        if 2 < newest < tokenizer.vocab_size and not may_change:
            assert seen == so_far  # no later than it must
        assert tokenizer.decode(ids).startswith(seen)
    assert seen == tokenizer.decode(ids)


def first_stop(tokenizer, ids, stops, stop_ids):
    """By decoding every beginning of `ids`: ids that count, text, and whether it was stopped."""
    for count, token in enumerate(ids, 1):
        text = tokenizer.decode(ids[:count])
        found = [text.index(stop) for stop in stops if stop in text.rstrip("\ufffd")]
        if found or token in stop_ids:
            return count, text[: min(found, default=None)], True
    return len(ids), tokenizer.decode(ids), False


@settings(deadline=None)
@given(
    samples=SAMPLES,
    cuts=CUTS,
    stops=st.lists(st.text("a b€😀é\n", min_size=1, max_size=3), max_size=3),
    mark=st.booleans(),
)
@example(samples=[9, 3 * 258 + 2], cuts=[], stops=["\n"], mark=False)  # with byte fallback, FF spoils the newline
def test_stop_strings_by_decoding_every_beginning(tokenizer, samples, cuts, stops, mark):
    ids, stop_ids = ids_of(tokenizer, samples), {1} if mark else set()
    text, seen, count = StreamedText(tokenizer, stops, stop_ids), "", 0
    for piece in (pieces := in_pieces(ids, cuts)):
        counted, new = text.add(piece, last=piece is pieces[-1])
        seen, count = seen + new, count + counted
        if text.stopped:
            break
    assert (count, seen, text.stopped) == first_stop(tokenizer, ids, stops, stop_ids)


@pytest.mark.parametrize("stops", [(), ("never", "\ufffd\ufffda")])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_few_ids_are_decoded_for_each(tokenizer, monkeypatch, stops, size):
    """However many came before, special, unknown and garbled ones too."""
    decoded, original = [], Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **kw: decoded.append(len(ids)) or original(self, ids, **kw)
    )
    for samples in (range(900), [1] * 900, [4] * 900, [7] * 900, [2 + 3 * 255] * 900):
        ids = ids_of(tokenizer, samples)
        if stops:  # a run of bytes is decoded anew for each of them, to find a stop string in it
            ids = [token for token in ids if not is_byte(tokenizer, token)]
        text = StreamedText(tokenizer, stops)
        decoded.clear()
        for start in range(0, len(ids), size):
            text.add(ids[start : start + size])
        text.add([], last=True)
        assert sum(decoded) <= 20 * len(ids) + 2 * tokenizer.vocab_size


def test_a_shared_prefix(make_close):
    """Nothing changes but where the prefix's cache comes from: one of other ids shows in the output."""
    model, shared = make_close(), [5, 9, 2, 33, 7]
    prompts = [[*shared, *rest] for rest in ([], [40] * 4, [8])]
    prefix, other = make_prefix(model, shared), make_prefix(model, [1, 2, 3, 4, 6])

    def stream(prefix):
        made = Stream(model, prompts, DecodeConfig(draft_steps=3, max_new_tokens=30), eos_ids=(), prefix=prefix)
        return collect(made), made.generations

    whole = stream(None)
    assert stream(prefix) == whole
    assert stream(replace(prefix, filled=other.filled)) != whole
    with pytest.raises(UserError, match="prompt 0 does not begin with the 5 tokens"):
        Stream(model, [[5, 9]], SETTINGS, prefix=prefix)


def test_cancelling_leaves_the_model_usable(reciter):
    prompts = encode(reciter, "a", "c")
    before, _ = generate_batch(reciter, prompts, SETTINGS)
    iterator = iter(Stream(reciter, prompts, SETTINGS, every=1))
    assert [piece.ids for piece in next(iterator)] == [generation.new_ids[:1] for generation in before]
    next(iterator)
    iterator.close()
    assert list(iterator) == []
    assert generate_batch(reciter, prompts, SETTINGS)[0] == before
    stream = Stream(reciter, prompts, SETTINGS, every=1)
    collect(stream)
    assert stream.generations == before


def test_sampled_stream(make_close):
    """Without a tokenizer: ids alone."""
    model, prompts = make_close(), [[5, 9, 2], [40] * 9, [7]]
    settings, options = (
        DecodeConfig(draft_steps=3, max_new_tokens=30),
        {"sampling": SamplingConfig(temperature=1.2, seed=9), "eos_ids": ()},
    )
    expected, _ = generate_batch(model, prompts, settings, **options)
    stream = Stream(model, prompts, settings, every=2, **options)
    assert collect(stream) == [(generation.new_ids, "", "length") for generation in expected]
    assert stream.generations == expected


def test_compiles_once(reciter, monkeypatch):
    """One trace for a generation and for streams of any stretch, plain ones too."""
    speculative.decode_rounds.clear_cache()
    traces, original = [], speculative.speculative_round

    def counting(*args):
        traces.append(1)
        return original(*args)

    monkeypatch.setattr(speculative, "speculative_round", counting)
    prompts = encode(reciter, "a", "c")
    generate_batch(reciter, prompts, SETTINGS)
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
