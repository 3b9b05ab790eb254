"""An engine that learns against one that does not, on the same prompts: tokens per round and tokens/s over time.

    python -m experiments.serve_learning --out FILE.jsonl                                  # a tiny model, on any device
    python -m experiments.serve_learning --checkpoint CKPT --data FILE --drafter fused --requests 20000 --out FILE.jsonl

`--clients` readers keep as many requests under way, each asking for the next prompt when its reply is there. The
frozen engine goes first (with `--frozen N`, through the first N alone), then the one that learns; every reply of both
must be the same. Writes a line of JSON for every `--every` requests, of what came since the last one, and one for each
engine at its end, of all; seconds are without starting and compiling. Of the engine's thread, `waited_seconds` went by
for the device, `handed_seconds` giving it programs, `host_seconds` with the rest of serving; `intake_seconds`, of all
three, taking prompts in; and `learner_seconds`, besides, with turns of the learner. `slots_at_work` is the share of the
rounds computed for slots that were a reply's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import yaml

from dvi_jax.config import DataConfig
from dvi_jax.data.conversations import ConversationStream
from dvi_jax.data.prompts import PromptStream
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.new_drafter import kept_or_new_drafter
from dvi_jax.loading import LoadedModel, enable_compilation_cache, from_checkpoint
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.learner import Learner
from dvi_jax.serve.pace import SWITCH_SECONDS
from dvi_jax.serve.requests import EngineStatus, Request
from dvi_jax.trained_parts import with_drafter_from
from experiments.measure import settings_of
from experiments.tiny import write_questions, write_tiny_model

LONGEST = 8  # bytes of a digest of a reply


@dataclass
class Progress:
    """What a stream of requests has come to, under `lock`."""

    lock: threading.Lock
    replies: list[bytes | None]  # digest of each reply's ids
    done: int = 0


@dataclass(frozen=True)
class Look:
    """What an engine has come to at a moment."""

    done: int  # requests
    seconds: float  # since the first was asked
    status: EngineStatus


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the stream twice; 1 if a reply differs."""
    options = _parser().parse_args(arguments)
    enable_compilation_cache()
    sys.setswitchinterval(SWITCH_SECONDS)
    with tempfile.TemporaryDirectory() as folder, open(options.out, "w", encoding="utf-8") as file:
        model, requests = _prepare(options, Path(folder))
        _write(
            file,
            {
                "kind": "about",
                "device": jax.devices()[0].device_kind,
                **_told(options),
                "drafter": model.manifest.drafter,
            },
        )
        frozen = serve(model, requests[: options.frozen], options, None, file)
        settings = LearnSettings(share=options.learn_share, window=options.window, seed=options.seed)
        learner = Learner(model, settings, options.context)
        learning = serve(model, requests, options, learner, file)
        different = sum(a is None or a != b for a, b in zip(frozen, learning, strict=False))
        _write(file, {"kind": "equal", "requests": len(frozen), "different": different})
    return int(different > 0)


def serve(
    model: LoadedModel, requests: list[Request], options: argparse.Namespace, learner: Learner | None, file: TextIO
) -> list[bytes | None]:
    """All requests through one engine; the digests of their replies."""
    name = "frozen" if learner is None else "learning"
    shape = {"slots": options.slots, "context": options.context, "plan": options.plan, "max_waiting": options.clients}
    progress = Progress(threading.Lock(), [None] * len(requests))
    with Engine(model, **shape, warm_up=True, learner=learner) as engine:
        before, indices = Look(0, 0.0, engine.status()), iter(range(len(requests)))
        began = time.perf_counter()

        def read() -> None:
            while True:
                with progress.lock:
                    index = next(indices, None)
                if index is None:
                    return
                whole = engine.submit(requests[index]).whole()
                digest = hashlib.sha256(np.array(whole.ids, np.int32).tobytes()).digest()[:LONGEST]
                with progress.lock:
                    progress.replies[index] = digest
                    progress.done += 1

        threads = [threading.Thread(target=read, daemon=True) for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        start = before
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.02)
            if progress.done - before.done >= options.every:
                now = Look(progress.done, time.perf_counter() - began, engine.status())
                _write(file, _line(name, before, now, learner))
                before = now
        for thread in threads:
            thread.join()
        end = Look(progress.done, time.perf_counter() - began, engine.status())
    _write(file, _line(name, start, end, learner) | {"kind": "end"})
    if failure := engine.status().failure:
        raise UserError(failure)
    return progress.replies


def _line(name: str, before: Look, now: Look, learner: Learner | None) -> dict[str, Any]:
    """What happened from one look to the next."""

    def more(field: str) -> float:
        """A counter of the engine's status, of tuples the sum."""
        return float(np.sum(getattr(now.status, field)) - np.sum(getattr(before.status, field)))

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    record = {
        "kind": "progress",
        "engine": name,
        "requests": now.done,
        "seconds": now.seconds,
        "plan": now.status.plan,
        "gain": now.status.gain,
        "tokens_per_second": more("new_tokens") / (now.seconds - before.seconds),
        "tokens_per_round": ratio(more("new_tokens"), more("rounds")),
        "accept_rate": ratio(more("accepted"), more("judged")),
        "stretches": int(more("stretches")),
        "rounds_per_stretch": ratio(more("slot_rounds") / now.status.slots, more("stretches")),
        "slots_at_work": ratio(more("rounds"), more("slot_rounds")),
        "host_seconds": more("busy_seconds") - more("waited_seconds") - more("handed_seconds"),
    }
    record |= {f"{part}_seconds": more(f"{part}_seconds") for part in ("waited", "handed", "intake", "learner")}
    if learner is not None:
        status = learner.status
        record |= {
            "updates": status.updates,
            "swaps": status.swaps,
            "rollbacks": status.rollbacks,
            "learned_positions": status.learned_positions,
            "learning_share": status.seconds / now.seconds,
            "update_seconds": status.update_seconds,
            "digest": status.digest,
            "state": status.state,
        }
    return record


def _prepare(options: argparse.Namespace, folder: Path) -> tuple[LoadedModel, list[Request]]:
    """The model with the drafter to begin with, and the stream: the questions again and again if there are too few."""
    checkpoint, data = options.checkpoint, options.data
    if checkpoint is None:
        checkpoint, data = folder / "model", [str(folder / "questions.jsonl")]
        write_tiny_model(checkpoint)
        write_questions(Path(data[0]), 50)
    elif not data:
        raise UserError("--checkpoint needs --data: conversations whose questions are asked")
    opened = open_checkpoint(checkpoint)
    if options.drafter_from is not None:
        opened = with_drafter_from(opened, options.drafter_from)
    chosen = kept_or_new_drafter(opened, options.drafter, _drafter_options(options), options.exit_layer)
    model = from_checkpoint(chosen, seed=options.seed)
    longest = options.context - options.max_new_tokens
    if longest < 1:
        raise UserError(f"--context {options.context} has no room for a prompt and --max-new-tokens")
    config = DataConfig(tuple(data), max_prompt_tokens=longest, turns="all", held_out_fraction=0.0)
    tokenizer = model.need_tokenizer("this checkpoint has no tokenizer, which conversations need")
    prompts = [prompt.ids for prompt in itertools.islice(_prompts(data, tokenizer, config), options.requests)]
    if not prompts:
        raise UserError("no question of --data fits into --context")
    endless = itertools.islice(itertools.cycle(prompts), options.requests)
    return model, [Request(tuple(ids), options.max_new_tokens) for ids in endless]


def _drafter_options(options: argparse.Namespace) -> dict[str, Any]:
    given = yaml.safe_load(options.drafter_options)
    if not isinstance(given, dict):
        raise UserError(f"--drafter-options {options.drafter_options}: not options as in '{{taps: [2, 9]}}'")
    return given


def _prompts(files: Sequence[str], tokenizer: Any, config: DataConfig) -> Iterator[Any]:
    return iter(PromptStream(ConversationStream(tuple(files)), tokenizer, config))


def _told(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in settings_of(options).items() if name not in ("debug", "data")}


def _write(file: TextIO, record: dict[str, Any]) -> None:
    line = json.dumps(record, default=str)
    print(line, file=file, flush=True)
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.serve_learning", description=__doc__)
    parser.add_argument("--checkpoint", metavar="CKPT", help="without: a tiny random model that speaks bytes")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="conversations whose questions are asked")
    parser.add_argument("--drafter-from", metavar="DIR", help="begin with this trained drafter")
    parser.add_argument("--drafter", metavar="KIND", help="begin with an untrained drafter of this kind")
    parser.add_argument(
        "--drafter-options", default="{}", metavar="YAML", help="of an untrained drafter: '{taps: [2, 9]}'"
    )
    parser.add_argument(
        "--exit-layer", type=int, metavar="K", help="of an untrained drafter (default: 0 where it needs none)"
    )
    parser.add_argument("--requests", type=at_least_one, default=300, metavar="N")
    parser.add_argument("--frozen", type=at_least_one, metavar="N", help="requests without learning (default: all)")
    parser.add_argument("--clients", type=at_least_one, default=8, metavar="N", help="requests under way at any time")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=32, metavar="N")
    parser.add_argument("--slots", type=at_least_one, default=4, metavar="N")
    parser.add_argument("--context", type=at_least_one, default=128, metavar="N")
    parser.add_argument("--plan", default="chain:2", metavar="PLAN", help="how rounds draft (auto: by what pays)")
    parser.add_argument("--learn-share", type=float, default=LearnSettings.share, metavar="X")
    parser.add_argument("--window", type=at_least_one, default=LearnSettings.window, metavar="N")
    parser.add_argument("--every", type=at_least_one, default=50, metavar="N", help="requests from line to line")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of new weights and of what is learned from")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
