"""Conversations on a tiny model: the prompts, the answers, the order, the skipped turns, the compiled programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import generate_batch
from dvi_jax.decode.choosing import PlanChooser
from dvi_jax.decode.plan import Option, Plan
from dvi_jax.errors import UserError
from dvi_jax.evaluate import runner
from dvi_jax.evaluate.runner import EARLIER_TURN, TOO_LONG, PairedDecoder, Skipped, first_prompt
from dvi_jax.evaluate.spec_bench import Question

SETTINGS = DecodeConfig(draft_steps=3, max_new_tokens=20)
TWO_TURNS = Question(1, "qa", ("Who is on the moon?", "Why?"))


class Listening(PairedDecoder):
    """Keeps the prompts it was given and the order it was asked for."""

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.prompts, self.turns = [], []

    def decode(self, prompt, turn):
        self.prompts.append(list(prompt))
        self.turns.append(turn)
        return super().decode(prompt, turn)


@pytest.fixture
def decoder(model):
    return Listening(model, SETTINGS)


def test_a_later_prompt_holds_the_models_own_answer(decoder, model):
    (answered,) = decoder.run([TWO_TURNS])
    answer = answered.texts[0]
    assert answer
    encode = model.tokenizer.encode
    first = "<|im_start|>user:Who is on the moon?<|im_end|><|im_start|>assistant:"
    assert decoder.prompts[0] == encode(first)
    second = f"{first}{answer}<|im_end|><|im_start|>user:Why?<|im_end|><|im_start|>assistant:"
    assert decoder.prompts[1] == encode(second)
    assert answer == model.tokenizer.decode(answered.turns[0].plain.new_ids)


def test_both_modes_give_what_generate_gives(decoder, model):
    (answered,) = decoder.run([TWO_TURNS])
    for turn, prompt in zip(answered.turns, decoder.prompts, strict=True):
        (plain,), _ = generate_batch(model, [prompt], SETTINGS, plain=True)
        (speculative,), _ = generate_batch(model, [prompt], SETTINGS)
        assert turn.plain.new_ids == turn.speculative.new_ids == plain.new_ids
        assert turn.speculative.accept_lengths == speculative.accept_lengths
        assert turn.speculative.drafted == speculative.drafted
        assert turn.plain.accept_lengths == [1] * (len(plain.new_ids) - 1)
        assert turn.speculative.prompt_tokens == len(prompt)
        assert min(turn.plain.seconds, turn.speculative.seconds, turn.plain.prefill_seconds) > 0


def test_the_model_is_one_that_can_tell_modes_apart(decoder):
    """Some drafts are accepted and some are not, else the tests above say little."""
    (answered,) = decoder.run([TWO_TURNS])
    lengths = [length for turn in answered.turns for length in turn.speculative.accept_lengths]
    assert 1 in lengths
    assert max(lengths) > 1


def test_each_mode_goes_first_in_turn(decoder):
    answers = list(
        decoder.run([TWO_TURNS, Question(2, "qa", ("Is the moon old?",)), Question(3, "qa", ("Is the moon new?",))])
    )
    assert decoder.turns == [0, 1, 1, 2]
    turns = [turn for answered in answers for turn in answered.turns]
    first = [[trace.mode for trace in (turn.plain, turn.narrow, turn.speculative) if trace.ran_first] for turn in turns]
    assert first == [["plain"], ["fastest_plain"], ["fastest_plain"], ["speculative"]]


def test_turns_beyond_the_context_are_skipped_with_their_reason(decoder, model):
    template = len(["<|im_start|>", *"user:", "<|im_end|>", "<|im_start|>", *"assistant:"])
    room = model.config.max_position_embeddings - SETTINGS.max_new_tokens - template
    fits, too_long = "x" * room, "x" * (room + 1)
    long_later = Question(3, "qa", ("Is the moon old?", "x" * room, "never"))
    answers = list(decoder.run([Question(1, "qa", (fits,)), Question(2, "qa", (too_long,)), long_later]))
    assert len(decoder.prompts[0]) + SETTINGS.max_new_tokens == model.config.max_position_embeddings
    assert [len(answered.turns) for answered in answers] == [1, 0, 1]
    assert answers[0].skipped == []
    assert answers[1].skipped == [Skipped(2, 0, TOO_LONG)]
    assert answers[2].skipped == [Skipped(3, 1, TOO_LONG), Skipped(3, 2, EARLIER_TURN)]


def test_a_program_serves_all_prompts_of_its_size(model, monkeypatch):
    """Early exit drafts nothing where nothing is wanted: two programs a size, that one and one of a single row."""
    compiled = []

    class Counting:
        @staticmethod
        def lower(*arguments):
            compiled.append((arguments[2].tokens.shape[1], arguments[2].committed.hidden.shape[1], str(arguments[4])))
            return decode.lower(*arguments)

    decode = runner.decode_rounds
    monkeypatch.setattr(runner, "decode_rounds", Counting)
    questions = [Question(size, "qa", ("x" * size,)) for size in (20, 21, 22, 100, 101)]
    answers = list(PairedDecoder(model, SETTINGS).run(questions))
    slots = [trace.cache_slots for a in answers for trace in (a.turns[0].plain, a.turns[0].speculative)]
    assert len(set(slots)) == 2
    programs = [(size, *program) for size in set(slots) for program in ((1, "plain"), (4, "early-exit:3"))]
    assert sorted(compiled) == sorted(programs)


def test_questions_of_which_none_can_be_asked_are_refused(decoder):
    too_long = Question(1, "qa", ("x" * 500,))
    with pytest.raises(UserError, match=f"none of the 2 questions can be asked; the first: {TOO_LONG}"):
        first_prompt(decoder, [too_long, too_long])
    first_prompt(decoder, [too_long, TWO_TURNS])


def test_a_model_without_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="no tokenizer"):
        first_prompt(PairedDecoder(replace(model, tokenizer=None), SETTINGS), [TWO_TURNS])


def test_the_fastest_plain_decoding_is_one_row_wide(decoder, model):
    (answered,) = decoder.run([TWO_TURNS])
    for turn, prompt in zip(answered.turns, decoder.prompts, strict=True):
        (narrow,), _ = generate_batch(model, [prompt], replace(SETTINGS, draft_steps=0))
        assert turn.fastest is turn.narrow
        assert (turn.fastest.mode, turn.fastest.new_ids) == ("fastest_plain", narrow.new_ids)


@pytest.mark.parametrize(("plan", "measured_apart"), [("chain:3", False), ("early-exit:3", True)])
def test_where_rows_are_alike_plain_decoding_is_the_fastest(model, monkeypatch, plan, measured_apart):
    """But for early exit, whose program is as wide as ever when it drafts nothing."""
    monkeypatch.setattr(runner, "rows_alike", lambda rows, config, dtype: True)
    (answered,) = PairedDecoder(model, replace(SETTINGS, plan=plan)).run([TWO_TURNS])
    assert all((turn.narrow is not None) == measured_apart for turn in answered.turns)
    assert all(turn.fastest is (turn.narrow if measured_apart else turn.plain) for turn in answered.turns)


def test_every_program_is_counted_before_any_runs(model, monkeypatch):
    counted = []

    def refuse(model, sizes, limit):
        counted.append((sizes.width, str(sizes.plan), limit))
        if sizes.width == 4 and str(sizes.plan) == plan:
            raise UserError("too much")

    monkeypatch.setattr(runner, "measure_memory", refuse)
    monkeypatch.setattr(runner, "start", None)  # nothing may be put on the device
    for plan, programs in (
        ("chain:3", [(4, "plain", 7), (1, "plain", 7), (4, "chain:3", 7)]),
        ("early-exit:3", [(4, "early-exit:3", 7)]),
    ):
        counted.clear()
        with pytest.raises(UserError, match="too much"):
            PairedDecoder(model, replace(SETTINGS, plan=plan), 7).decode([1, 2, 3], 0)
        assert counted == programs


def test_a_chooser_chooses_every_generation(model):
    """It starts with what costs nothing, is told what was accepted, and plain decoding follows its width."""
    costs = {Option(Plan("early-exit", 3), 4): 1.0, Option(Plan("early-exit", 1), 2): 50.0}
    chooser = PlanChooser(model, costs)
    (answered,) = PairedDecoder(model, SETTINGS, chooser=chooser).run([TWO_TURNS])
    assert all(turn.identical and max(turn.speculative.drafted) == 3 for turn in answered.turns)
    assert chooser.acceptance.judged[0] > 1
    chooser.costs[Option(Plan("early-exit", 1), 2)] = 0.01
    (answered,) = PairedDecoder(model, SETTINGS, chooser=chooser).run([TWO_TURNS])
    assert all(turn.identical and max(turn.speculative.drafted) == 1 for turn in answered.turns)
