"""An engine under load, against batches: tokens a second, waiting times, and whether anything grows.

    python -m experiments.engine_load --shape smollm2 --slots 8 32 --requests 400 --out load.jsonl
    python -m experiments.engine_load --checkpoint CKPT --drafter-from DIR --plan auto --slots 8

Prompts of random tokens and replies that nothing ends early, in lengths as ShareGPT has them. For each number of slots:

* `engine`: all requests at once;
* `batches`: the same requests in batches of as many, each decoded until its slowest is done;
* `equal`: one batch whose prompts and replies all have the mean length, the best that a batch can be;
* `arrivals`: requests arriving at random moments, at a share of the rate that the engine has just shown;
* `beside`: long prompts arriving one by one beside replies that fill half the slots, and what that does to these.

Every line of the result is an object: a `result` for each of these, and every few seconds a `sample` of memory and
compiled programs. Programs are compiled before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dvi_jax.config import DecodeConfig
from dvi_jax.decode.batch import make_knobs, start
from dvi_jax.decode.plan import PLAIN, Plan
from dvi_jax.decode.prefill import bucket
from dvi_jax.decode.speculative import decode_rounds
from dvi_jax.decode.state import FOREVER
from dvi_jax.errors import ArgumentParser, UserError, run_cli
from dvi_jax.loading import LoadedModel, enable_compilation_cache, load
from dvi_jax.presets import SHAPES
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.many import side_by_side
from dvi_jax.serve.pace import SWITCH_SECONDS
from dvi_jax.serve.plans import AUTO
from dvi_jax.serve.reply import Reply
from dvi_jax.serve.requests import Request
from experiments.measure import environment, random_model, settings_of

COMPILED = "/jax/core/compile/backend_compile_duration"
# Logarithms of ShareGPT's lengths in tokens are about normal: medians, and standard deviations of the logarithm.
PROMPT_MEDIAN, PROMPT_SPREAD = 100, 1.0
REPLY_MEDIAN, REPLY_SPREAD = 200, 0.8
REQUESTS_EACH = 25  # requests for each slot
# Of the time to first token, and of the gap between one piece of a reply and the next.
MILLISECONDS = ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every number of slots; lines as they come, a table at the end."""
    options = parse(arguments)
    enable_compilation_cache()
    sys.setswitchinterval(SWITCH_SECONDS)
    if options.checkpoint:
        model = load(options.checkpoint, drafter_from=options.drafter_from)
    else:
        model = random_model(SHAPES[options.shape], options.dtype, options.exit_layer, options.drafter)
    out = options.out.open("w", encoding="utf-8") if options.out else sys.stdout
    report = Report(out)
    report.line(kind="settings", **environment(), **settings_of(options))
    jax.monitoring.register_event_duration_secs_listener(report.count_compilation)
    for slots in options.slots:
        measure(model, slots, options, report)
    jax.monitoring.unregister_event_duration_listener(report.count_compilation)
    if options.out:
        out.close()
    show(report.results)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.engine_load", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights")
    model.add_argument("--checkpoint", metavar="CKPT")
    parser.add_argument("--drafter-from", metavar="DIR")
    parser.add_argument("--drafter", default="exit_head", help="of random weights")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of random weights")
    parser.add_argument("--exit-layer", type=int, default=2, help="of random weights")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--plan", default="plain", help="of the engine; batches take it too, or plain for auto")
    parser.add_argument("--chunk", type=int, help="tokens of a prompt that go through at once (as files of prompts)")
    parser.add_argument("--together", type=int, help="prompts that are taken in side by side (as files of prompts)")
    parser.add_argument("--requests", type=int, default=0, help="0: 25 for each slot, so that the last ones are few")
    parser.add_argument("--longest-prompt", type=int, default=1024)
    parser.add_argument("--longest-reply", type=int, default=1024)
    parser.add_argument("--beside-prompt", type=int, default=2048, help="tokens of the prompts that arrive beside")
    parser.add_argument("--beside-count", type=int, default=20, help="how many of them")
    parser.add_argument("--beside-seconds", type=float, default=5.0, help="the others alone, before these")
    parser.add_argument("--load", type=float, default=0.8, help="arrivals, as a share of the engine's own rate")
    parser.add_argument("--sample-seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    options = parser.parse_args(arguments)
    longest = max(options.longest_prompt + options.longest_reply, options.beside_prompt + 64)
    if longest > options.context:
        raise UserError(f"--context {options.context} is too short: the longest request has {longest} tokens")
    return options


@dataclass
class Report:
    """Where lines go, and the results among them."""

    out: TextIO
    results: list[dict[str, Any]] = field(default_factory=list)
    compiled: int = 0

    def count_compilation(self, event: str, duration_secs: float, **details: object) -> None:
        """A listener of `jax.monitoring`."""
        self.compiled += event == COMPILED

    def result(
        self,
        name: str,
        slots: int,
        plan: str,
        seconds: float,
        tokens: int,
        timelines: Sequence[Timeline] = (),
        **more: Any,
    ) -> None:
        """What came of one load: `tokens` replied in `seconds`, and times in milliseconds."""
        firsts = [timeline.first for timeline in timelines]
        gaps = [gap for timeline in timelines for gap in timeline.gaps()]
        times = [percentile(values, share) for values in (firsts, gaps) for share in (50, 99)]
        fields = {
            "load_kind": name,
            "slots": slots,
            "plan": plan,
            "seconds": round(seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            **dict(zip(MILLISECONDS, times, strict=True)),
            **more,
        }
        self.results.append(fields)
        self.line(kind="result", **fields)

    def line(self, **fields: Any) -> None:
        """One object."""
        print(json.dumps(fields, default=str), file=self.out, flush=True)

    @asynccontextmanager
    async def sampled(self, engine: Engine, seconds: float) -> AsyncIterator[None]:
        """A `sample` every so many seconds, and one at the end."""

        def sample() -> None:
            arrays, status = jax.live_arrays(), engine.status()
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.line(
                kind="sample",
                slots=status.slots,
                running=status.running,
                waiting=status.waiting,
                new_tokens=status.new_tokens,
                plan=status.plan,
                resident_mib=pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
                arrays=len(arrays),
                arrays_mib=sum(array.nbytes for array in arrays) // 2**20,
                compiled=self.compiled,
            )

        async def repeat() -> None:
            while True:
                sample()
                await asyncio.sleep(seconds)

        task = asyncio.create_task(repeat())
        try:
            yield
        finally:
            task.cancel()
            sample()


def draw_requests(options: argparse.Namespace, slots: int, vocab_size: int) -> list[Request]:
    """Requests of ShareGPT-like lengths."""
    rng, count = np.random.default_rng(options.seed), options.requests or REQUESTS_EACH * slots

    def lengths(median: float, spread: float, longest: int) -> np.ndarray:
        drawn = np.exp(rng.normal(np.log(median), spread, count))
        return np.clip(drawn, 4, longest).astype(int)

    prompts = lengths(PROMPT_MEDIAN, PROMPT_SPREAD, options.longest_prompt)
    replies = lengths(REPLY_MEDIAN, REPLY_SPREAD, options.longest_reply)
    return [make_request(rng, int(p), int(r), vocab_size) for p, r in zip(prompts, replies, strict=True)]


def make_request(rng: np.random.Generator, prompt: int, reply: int, vocab_size: int) -> Request:
    """A prompt of random tokens, and a reply that nothing ends early."""
    return Request(tuple(rng.integers(3, vocab_size, prompt).tolist()), reply, eos_ids=())


@dataclass
class Timeline:
    """When a request's pieces came, in seconds."""

    submitted: float
    pieces: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.pieces[0] - self.submitted

    def gaps(self, since: float = 0.0) -> list[float]:
        """Between one piece and the next, of those that came after `since`."""
        return [late - early for early, late in itertools.pairwise(self.pieces) if late > since]


async def ask(engine: Engine, request: Request, delay: float = 0.0) -> Timeline:
    """Submit after `delay` seconds and read to the end."""
    await asyncio.sleep(delay)
    timeline = Timeline(time.perf_counter())
    await follow(engine.submit(request), timeline)
    return timeline


async def follow(reply: Reply, timeline: Timeline) -> None:
    """Read to the end."""
    async for piece in reply.stream():
        if piece.ids:
            timeline.pieces.append(time.perf_counter())


def measure(model: LoadedModel, slots: int, options: argparse.Namespace, report: Report) -> None:
    """All results of one number of slots."""
    vocab_size = model.config.vocab_size
    requests, (chunk, together) = draw_requests(options, slots, vocab_size), side_by_side(slots, options.longest_prompt)
    tokens = sum(request.max_new_tokens for request in requests)
    with Engine(
        model,
        slots=slots,
        context=options.context,
        plan=options.plan,
        max_waiting=len(requests),
        prefix_bytes=0,
        warm_up=True,
        chunk=options.chunk or chunk,
        together=options.together or together,
    ) as engine:
        print(engine.memory.describe(), file=sys.stderr, flush=True)
        asyncio.run(load_engine(engine, requests, options, report))
    del engine  # batches need the memory of its slots
    gc.collect()
    plan = PLAIN if options.plan == AUTO else Plan.parse(options.plan)
    batches = [requests[i : i + slots] for i in range(0, len(requests), slots)]
    seconds, prefill = batch_seconds(model, batches, slots, plan)
    report.result("batches", slots, str(plan), seconds, tokens, prefill_seconds=round(prefill, 3))
    # As much work, in batches that waste nothing.
    prompt, reply = sum(len(r.prompt_ids) for r in requests) // len(requests), tokens // len(requests)
    rng = np.random.default_rng(options.seed)
    equal = [[make_request(rng, prompt, reply, vocab_size) for _ in range(slots)]] * 3
    seconds, prefill = batch_seconds(model, equal, slots, plan)
    report.result("equal", slots, str(plan), seconds, 3 * slots * reply, prefill_seconds=round(prefill, 3))


async def load_engine(engine: Engine, requests: list[Request], options: argparse.Namespace, report: Report) -> None:
    """What is asked of the engine itself."""
    tokens, count = sum(request.max_new_tokens for request in requests), len(requests)
    rng = np.random.default_rng(options.seed + 1)
    await ask(engine, requests[0])  # compiles what warming up has left
    before = engine.status()
    async with report.sampled(engine, options.sample_seconds):
        began = time.perf_counter()
        timelines = await asyncio.gather(*(ask(engine, request) for request in requests))
        seconds, status = time.perf_counter() - began, engine.status()

        def more(name: str) -> float:
            return float(getattr(status, name) - getattr(before, name))

        shares = {
            "tokens_per_round": more("new_tokens") / max(more("rounds"), 1),
            "slots_at_work": more("rounds") / max(more("slot_rounds"), 1),
            "waited_share": more("waited_seconds") / more("busy_seconds"),
            "handed_share": more("handed_seconds") / more("busy_seconds"),
            "intake_share": more("intake_seconds") / more("busy_seconds"),
        }
        report.result("engine", engine.slots, status.plan, seconds, tokens, timelines, **shares)
        delays = np.cumsum(rng.exponential(seconds / count / options.load, count)).tolist()
        began = time.perf_counter()
        timelines = await asyncio.gather(*map(ask, [engine] * count, requests, delays))
        seconds = time.perf_counter() - began
        report.result("arrivals", engine.slots, status.plan, seconds, tokens, timelines, load=options.load)
        await load_beside(engine, rng, options, report)


async def load_beside(engine: Engine, rng: np.random.Generator, options: argparse.Namespace, report: Report) -> None:
    """Long prompts, one after the other, beside replies that fill half the slots: what each does to the other."""
    vocab_size, running = engine.model.config.vocab_size, max(engine.slots // 2, 1)
    replies = [engine.submit(make_request(rng, 32, engine.context - 32, vocab_size)) for _ in range(running)]
    background = [Timeline(time.perf_counter()) for _ in replies]
    readers = [asyncio.create_task(follow(*pair)) for pair in zip(replies, background, strict=True)]
    await asyncio.sleep(options.beside_seconds)  # alone, past the beginnings of their replies
    alone = [gap for timeline in background for gap in timeline.gaps()]
    began = time.perf_counter()
    timelines = []
    for _ in range(options.beside_count):
        timelines.append(await ask(engine, make_request(rng, options.beside_prompt, 8, vocab_size)))
    seconds, status = time.perf_counter() - began, engine.status()
    beside = [gap for timeline in background for gap in timeline.gaps(began)]
    report.result(
        "beside",
        engine.slots,
        status.plan,
        seconds,
        8 * len(timelines),
        timelines,
        running=status.running,
        other_gap_p99_alone=percentile(alone, 99),
        other_gap_p99_beside=percentile(beside, 99),
    )
    for reply in replies:
        reply.cancel()
    await asyncio.gather(*readers)


def batch_seconds(model: LoadedModel, batches: list[list[Request]], slots: int, plan: Plan) -> tuple[float, float]:
    """Seconds of decoding batches of requests one after the other, and of their prefills among these.

    Compilations are not counted.
    """
    longest = max(len(request.prompt_ids) for batch in batches for request in batch)
    settings = DecodeConfig(
        draft_steps=plan.drafts,
        plan=str(plan),
        max_new_tokens=max(request.max_new_tokens for batch in batches for request in batch),
    )
    knobs = make_knobs(settings, ())

    def decode(batch: list[Request], rounds: int = FOREVER) -> float:
        began = time.perf_counter()
        filled = batch + batch[:1] * (slots - len(batch))
        prompts = [request.prompt_ids for request in filled]
        limits = [len(request.prompt_ids) + request.max_new_tokens for request in filled]
        state = jax.block_until_ready(start(model, prompts, settings, knobs, longest_prompt=longest))
        prefill = time.perf_counter() - began
        limit = jnp.array(limits, jnp.int32)
        state = state.replace(limit=limit, done=state.length >= limit)
        until = knobs._replace(until=jnp.int32(rounds))
        jax.block_until_ready(decode_rounds(model.definition, model.decode_params, state, until, plan))
        return prefill

    shapes = {bucket(max(len(request.prompt_ids) for request in batch)): batch for batch in batches}
    for batch in shapes.values():
        decode(batch, rounds=1)
    began = time.perf_counter()
    prefill = sum(map(decode, batches))
    return time.perf_counter() - began, prefill


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    return round(1000 * float(np.percentile(values, share)), 2) if values else None


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("slots", "load", "plan", "tokens/s", *(f"{name} ms" for name in MILLISECONDS))
    for result in results:
        times = ("" if result[name] is None else f"{result[name]:.1f}" for name in MILLISECONDS)
        rate = f"{result['tokens_per_second']:.0f}"
        table.add_row(str(result["slots"]), result["load_kind"], result["plan"], rate, *times)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
