"""From traces to the numbers of a report: acceptance, speed and equality, per category and overall."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dvi_jax.decode.acceptance import accept_length_histogram, consecutive_accept_rates, measure_acceptance
from dvi_jax.evaluate.runner import Skipped
from dvi_jax.evaluate.spec_bench import MT_BENCH
from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE, Trace, Turn

FORMAT_VERSION = 1


def summarise(
    turns: Sequence[Turn], skipped: Sequence[Skipped], draft_steps: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The object of summary.json. `mt_bench` is there when several of MT-Bench's categories are."""
    categories = list(dict.fromkeys(turn.speculative.category for turn in turns))
    from_mt_bench = [category for category in categories if category in MT_BENCH]

    def measured(*wanted: str) -> dict[str, Any]:
        return measure([turn for turn in turns if turn.speculative.category in wanted], draft_steps)

    return {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "overall": measure(turns, draft_steps),
        "categories": {category: measured(category) for category in categories},
        **({"mt_bench": measured(*from_mt_bench)} if len(from_mt_bench) > 1 else {}),
        "skipped": {
            "turns": len(skipped),
            "questions_not_asked": len({skip.question_id for skip in skipped if skip.turn == 0}),
            "reasons": dict(Counter(skip.reason for skip in skipped)),
        },
        "differences": [
            {
                "question_id": turn.speculative.question_id,
                "turn": turn.speculative.turn,
                "first_difference": turn.first_difference(),
            }
            for turn in turns
            if not turn.identical
        ],
    }


def measure(turns: Sequence[Turn], draft_steps: int) -> dict[str, Any]:
    """All numbers about some turns. Lists run over draft positions or accept lengths, from 1; None: nothing to count.

    Tokens per second is total tokens over total seconds of decoding; the prefill and its token stand apart. `speedup`
    is over plain decoding in passes of equal width, `speedup_over_fastest` over the fastest plain decoding.
    """
    traces = [turn.speculative for turn in turns]
    acceptance = measure_acceptance(traces)
    judged = [sum(min(d, a) > i for t in traces for d, a in _rounds(t)) for i in range(draft_steps)]
    rates = [*acceptance.per_position, *[0.0] * draft_steps][:draft_steps]
    plain, speculative = speed([turn.plain for turn in turns]), speed(traces)
    fastest = speed([turn.fastest for turn in turns])
    return {
        "questions": len({trace.question_id for trace in traces}),
        "generations": len(turns),
        "rounds": acceptance.rounds,
        "drafted": acceptance.drafted,
        "judged": acceptance.judged,
        "accepted": acceptance.accepted,
        "tokens_per_round": acceptance.tokens_per_round if acceptance.rounds else None,
        "accept_rate": acceptance.accept_rate if acceptance.judged else None,
        "judged_per_position": judged,
        "accept_rate_per_position": [rate if n else None for rate, n in zip(rates, judged, strict=True)],
        "ctar": consecutive_accept_rates(traces, draft_steps),
        "accept_length_histogram": accept_length_histogram(traces, draft_steps + 1),
        PLAIN: plain,
        SPECULATIVE: speculative,
        "speedup": _ratio(speculative["tokens_per_second"], plain["tokens_per_second"]),
        "speedup_with_prefill": _ratio(
            speculative["tokens_per_second_with_prefill"], plain["tokens_per_second_with_prefill"]
        ),
        FASTEST: fastest,
        "speedup_over_fastest": _ratio(speculative["tokens_per_second"], fastest["tokens_per_second"]),
        "median_speedup": _median([_turn_ratio(turn.speculative, turn.plain) for turn in turns]),
        "median_speedup_over_fastest": _median([turn_speedup(turn) for turn in turns]),
        "fastest_plain_identical": sum(turn.fastest.new_ids == turn.speculative.new_ids for turn in turns),
        "identical_questions": _identical_questions(turns),
        "identical_generations": sum(turn.identical for turn in turns),
    }


def speed(traces: Sequence[Trace]) -> dict[str, Any]:
    """Tokens and seconds of some generations of one mode."""
    tokens, seconds = sum(trace.decoded_tokens for trace in traces), sum(trace.seconds for trace in traces)
    prefill = sum(trace.prefill_seconds for trace in traces)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "prefill_seconds": prefill,
        "tokens_per_second": _ratio(tokens, seconds),
        "median_tokens_per_second": _median([_ratio(trace.decoded_tokens, trace.seconds) for trace in traces]),
        "tokens_per_second_with_prefill": _ratio(sum(len(t.new_ids) for t in traces), seconds + prefill),
    }


def turn_speedup(turn: Turn) -> float | None:
    """How many times faster than by the fastest plain decoding; None for an answer of the prefill's token alone."""
    return _turn_ratio(turn.speculative, turn.fastest)


def _turn_ratio(fast: Trace, plain: Trace) -> float | None:
    return _ratio(_ratio(fast.decoded_tokens, fast.seconds), _ratio(plain.decoded_tokens, plain.seconds))


def _rounds(trace: Trace) -> list[tuple[int, int]]:
    return list(zip(trace.drafted, trace.accept_lengths, strict=True))


def _identical_questions(turns: Sequence[Turn]) -> int:
    """Questions of which every turn came out the same in both modes."""
    different = {turn.plain.question_id for turn in turns if not turn.identical}
    return len({turn.plain.question_id for turn in turns} - different)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
