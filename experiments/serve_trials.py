"""A server that learns, and an engine, put to the test on a tiny model: company, hostility, kills, many requests.

    python -m experiments.serve_trials company --requests 500      # over HTTP, clients leaving in mid-reply
    python -m experiments.serve_trials hostile                     # idle connections, a large body, endless templates
    python -m experiments.serve_trials kills --kills 20            # SIGKILL at random moments, under load
    python -m experiments.serve_trials many --requests 20000       # through one engine

Exit status 1 where a promise is broken: a reply that is not the same alone; a request that is neither served nor
refused; a killed server that does not come back, or not with the drafter of its newest snapshot; memory, arrays or
compiled programs that grow. `many` counts arrays and programs after a tenth of the requests and at the end; for memory
every run says how much it grew.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import psutil

from dvi_jax.config import SamplingConfig
from dvi_jax.errors import ArgumentParser, UserError, at_least_one, run_cli
from dvi_jax.loading import enable_compilation_cache, load
from dvi_jax.serve.many import decode_many, open_engine
from dvi_jax.serve.requests import Request
from experiments import load as http_load
from experiments.engine_load import COMPILED
from experiments.measure import environment, write_result
from experiments.tiny import WORDS, write_tiny_model

BROKEN = 1  # exit status
SLOTS, CONTEXT = 4, 192
IDLE, CHATS = 1000, 100  # connections, and requests by a template that does not end
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LISTENING = re.compile(r"dashboard: (http://\S+)/dashboard")
STARTING_SECONDS, ANSWER_SECONDS = 600, 60
PAUSE = 0.2  # seconds of a client that got no reply
MOST_GROWTH = 64  # MiB of a server over as many requests again; less is how an allocator works


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trial; print what came of it."""
    options = _parser().parse_args(arguments)
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        template = ENDLESS if options.trial == "hostile" else None
        write_tiny_model(folder / "model", context=CONTEXT, chat_template=template)
        trial = {"company": company, "hostile": hostile, "kills": kills, "many": many}[options.trial]
        result = trial(folder, options)
    for name, value in result.items():
        print(f"{name:24} {value}")
    if options.out:
        write_result(options.out, environment() | {"trial": options.trial, **result})
    return BROKEN if result["broken"] else 0


class Server:
    """A server process that learns in `folder`; `with` ends it."""

    def __init__(self, folder: Path):
        """Start it; `url` is there once it listens."""
        command = [sys.executable, "-m", "dvi_jax.serve", "--checkpoint", str(folder / "model"), "--port", "0"]
        command += ["--slots", str(SLOTS), "--context", str(CONTEXT), "--plan", "chain:2", "--max-queued", "64"]
        command += ["--learn", "--out", str(folder / "run"), "--resume", "--save-seconds", "0.2"]
        self.process = subprocess.Popen([*command, "--learn-share", "0.5"], stderr=subprocess.PIPE, text=True)
        self.url: str | None = None
        self._listens = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> str:
        """Its address, once it listens."""
        self._listens.wait(STARTING_SECONDS)
        if self.url is None:
            raise UserError("the server did not come back")
        return self.url

    def status(self) -> dict[str, Any]:
        """`/v1/dvi/status`."""
        status: dict[str, Any] = httpx.get(f"{self.wait()}/v1/dvi/status", timeout=ANSWER_SECONDS).json()
        return status

    def resident_mib(self) -> int:
        """Its memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss // 2**20)

    def _read(self) -> None:
        """What it says, so that the pipe does not fill."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := LISTENING.search(line):
                self.url = found.group(1)
                self._listens.set()
        self._listens.set()


def company(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load twice, the second time with other seeds; every finished reply once more alone."""
    found: dict[str, Any] = {"checked": 0, "different": 0, "outcomes": {}}
    with Server(folder) as server:
        memory, counts = [], Counter[str]()
        for seed in (1, 2):
            arguments = ["--url", server.wait(), "--requests", str(options.requests), "--clients", "16"]
            arguments += ["--leave", "0.2", "--check", str(options.requests), "--max-tokens", "60"]
            settings = http_load.parse([*arguments, "--seed", str(seed), "--temperature", str(seed - 1.0)])
            requests = http_load.make_requests(settings)
            _, different, checked = asyncio.run(http_load.run(requests, settings))
            counts.update(asked.outcome for asked in requests)
            found["checked"], found["different"] = found["checked"] + checked, found["different"] + different
            memory.append(server.resident_mib())
        status = server.status()
    engine, learning = status["engine"], status["learning"]
    found |= {
        "outcomes": dict(counts),
        "running": engine["running"],
        "waiting": engine["waiting"],
        "updates": learning["updates"],
        "swaps": learning["swaps"],
        "memory_mib": memory,
    }
    lost = counts.keys() - {"finished", "left"}
    is_left = engine["running"] or engine["waiting"]
    grew = memory[1] - memory[0] > MOST_GROWTH
    return found | {"broken": bool(found["different"] or lost or is_left or grew or not learning["updates"])}


def hostile(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """1,000 connections that say nothing, 10 MB, and 100 chats by an endless template, beside ordinary requests."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the server inherits it
    with Server(folder) as server, ExitStack() as stack:
        url = httpx.URL(server.wait())
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection((url.host, url.port)))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=STARTING_SECONDS))
        pool = stack.enter_context(ThreadPoolExecutor(CHATS))
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        chats = [pool.submit(client.post, "/v1/chat/completions", json=chat) for _ in range(CHATS)]
        ordinary, seconds = Counter[int](), []
        while not (all(one.done() for one in chats) and ordinary):
            began = time.perf_counter()
            answer = client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4})
            ordinary[answer.status_code] += 1
            seconds.append(time.perf_counter() - began)
        afterwards = client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4}).status_code
        large = client.post("/v1/completions", json={"prompt": "x" * 10_000_000}).status_code
        refused = Counter(one.result().status_code for one in chats)
        engine = server.status()["engine"]
    found = {
        "chats": dict(refused),
        "ordinary": dict(ordinary),
        "longest_seconds": max(seconds),
        "afterwards": afterwards,
        "large": large,
        "running": engine["running"],
    }
    # Chats that wait for the template are open replies: beyond so many, whoever comes is told to come later.
    fine = refused.keys() <= {400, 503} and ordinary.keys() <= {200, 503} and (afterwards, large) == (200, 413)
    fine &= not engine["running"]
    return found | {"broken": not fine}


def kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Lives of a server, each ended by SIGKILL between its start and a few seconds after it listens."""
    rng, clients = random.Random(options.seed), Clients()
    lives: list[dict[str, Any]] = []
    starting = options.life  # seconds, as last seen
    for number in range(options.kills + 1):
        expected = newest_snapshot(folder / "run")
        with Server(folder) as server:
            began = time.perf_counter()
            more = rng.uniform(-0.3 * starting, options.life)  # seconds that it listens; some are killed before
            if 0 < number < options.kills and more < 0:
                time.sleep(starting + more)
                continue
            clients.url = server.wait()
            starting = time.perf_counter() - began
            learning = server.status()["learning"]
            lives.append({"expected": expected, "first_updates": learning["updates"], "digest": learning["digest"]})
            while number == 0 and not newest_snapshot(folder / "run"):  # else there is nothing to lose
                if server.process.poll() is not None or time.perf_counter() - began > STARTING_SECONDS:
                    raise UserError("the server keeps no snapshot")
                time.sleep(0.1)
            time.sleep(max(more, 0.5))
            clients.url = None
    clients.stop()
    return judge(lives, clients, options.kills)


def judge(lives: Sequence[dict[str, Any]], clients: Clients, kills: int) -> dict[str, Any]:
    """What came of the lives that listened: updates that their snapshot had, those they began with, their drafter."""
    # It may have learned more before its status was asked for, but not less.
    lost = sum(life["first_updates"] < life["expected"] for life in lives)
    drafters = len({life["digest"] for life in lives})
    moved = lives[-1]["expected"] > 0 and drafters > 1
    return {
        "kills": kills,
        "listening": len(lives),
        "snapshots": [life["expected"] for life in lives],
        "lost": lost,
        "drafters": drafters,
        "replies": clients.finished,
        "errors": clients.errors,
        "different": clients.different,
        "broken": bool(lost or clients.different or not clients.finished or not moved),
    }


class Clients:
    """Threads that ask the server at `url`, whichever it is; each reply must be the first one to its question."""

    def __init__(self, count: int = 8):
        self.url: str | None = None
        self.finished = self.errors = self.different = 0
        self._replies: dict[str, str] = {}
        self._lock, self._stopping = threading.Lock(), False
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more questions."""
        self._stopping = True
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        rng, client = random.Random(seed), httpx.Client(timeout=ANSWER_SECONDS)
        while not self._stopping:
            url, question = self.url, f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
            if url is None:
                time.sleep(PAUSE)
                continue
            body = {"prompt": question, "max_tokens": 60, "temperature": 0.8, "seed": 7, "ignore_eos": True}
            try:
                answer = client.post(f"{url}/v1/completions", json=body)
                answer.raise_for_status()
                text = answer.json()["choices"][0]["text"]
            except httpx.HTTPError:  # it was killed: ask again
                with self._lock:
                    self.errors += 1
                time.sleep(PAUSE)
                continue
            with self._lock:
                self.finished += 1
                self.different += text != self._replies.setdefault(question, text)


def newest_snapshot(run: Path) -> int:
    """Updates of the newest whole snapshot, 0 without one."""
    return max((int(path.parent.name) for path in (run / "snapshots").glob("[0-9]*/CHECKSUMS.json")), default=0)


def many(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Random requests through one engine; what is there after a tenth of them, and at the end."""
    compiled, events = [0], jax.monitoring

    def count(event: str, duration_secs: float, **details: object) -> None:
        compiled[0] += event == COMPILED

    events.register_event_duration_secs_listener(count)
    model, process = load(folder / "model"), psutil.Process(os.getpid())
    samples = []
    with open_engine(model, slots=SLOTS, context=CONTEXT, longest_prompt=60, plan="chain:2", warm_up=True) as engine:
        replies = decode_many(engine, random_requests(options.requests, model.config.vocab_size, options.seed))
        tenth = max(options.requests // 10, 1)
        for done, _ in enumerate(replies, 1):
            if done in (tenth, options.requests):
                gc.collect()
                arrays, resident = len(jax.live_arrays()), process.memory_info().rss // 2**20
                samples.append({"requests": done, "arrays": arrays, "compiled": compiled[0], "memory_mib": resident})
        new_tokens = engine.status().new_tokens
    events.unregister_event_duration_listener(count)
    first, last = samples[0], samples[-1]
    # Of requests under way there may be a few arrays more at one moment than at another.
    grew = last["compiled"] > first["compiled"] or last["arrays"] > first["arrays"] + 2 * SLOTS
    grew |= last["memory_mib"] - first["memory_mib"] > MOST_GROWTH
    return {"first": first, "last": last, "new_tokens": new_tokens, "broken": bool(grew)}


def random_requests(count: int, vocab_size: int, seed: int) -> Iterator[Request]:
    """Prompts of 1 to 60 tokens and replies of 1 to 40, greedy or sampled."""
    rng = np.random.default_rng(seed)
    for index in itertools.islice(itertools.count(), count):
        prompt = tuple(rng.integers(2, vocab_size, rng.integers(1, 61)).tolist())
        sampling = SamplingConfig(temperature=0.9, seed=index) if index % 2 else None
        yield Request(prompt, int(rng.integers(1, 41)), sampling)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m experiments.serve_trials", description=__doc__)
    parser.add_argument("trial", choices=["company", "hostile", "kills", "many"])
    parser.add_argument("--requests", type=at_least_one, default=500, metavar="N", help="of company and many")
    parser.add_argument("--kills", type=at_least_one, default=20, metavar="N")
    parser.add_argument("--life", type=float, default=5.0, metavar="S", help="longest time a server listens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
