"""What the tests of learning share: requests that come again, and turns of a learner without an engine."""

import jax
import jax.numpy as jnp
import numpy as np

from dvi_jax.config import OptimizerConfig, SamplingConfig
from dvi_jax.serve.learn_settings import LearnSettings
from dvi_jax.serve.requests import EngineStatus, Request

SETTINGS = LearnSettings(
    share=0.9,
    window=64,
    fresh_windows=2,
    replayed_windows=2,
    positions=64,
    replay_capacity=16,
    optimizer=OptimizerConfig(lora_lr=3e-2, head_lr=3e-2, warmup=0),
)


def requests(learn=True):
    """Six that come again and again: greedy and sampled."""
    rng = np.random.default_rng(0)
    return [
        Request(
            prompt_ids=tuple(rng.integers(2, 258, 12).tolist()),
            max_new_tokens=50,
            sampling=SamplingConfig(temperature=0.5, seed=index) if index % 3 == 2 else None,
            eos_ids=(),
            learn=learn,
        )
        for index in range(6)
    ]


def serve(engine, asked, pieces_of):
    """All replies' ids, and the accept rate of their drafts."""
    handles = [engine.submit(request) for request in asked]
    replies = [pieces_of(handle)[0] for handle in handles]
    drafts = [(handle.statistics.accepted, handle.statistics.rounds) for handle in handles]
    accepted, rounds = np.sum(drafts, axis=0)
    return replies, accepted / rounds  # drafts accepted in a round, of two


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def turned(learner, settle=None, plan="chain:2", **counts):
    """A turn of an engine that decodes so, idle."""
    status = EngineStatus(4, running=0, waiting=0, context=96, plan=plan, **counts)
    return learner.turn(status, idle=True, settle=settle)


def random_requests(count, seed):
    """Prompts of 1 to 60 tokens, replies of 1 to 36; greedy or sampled in several ways, with ends of their own."""
    rng = np.random.default_rng(seed)
    requests = []
    for index in range(count):
        sampling = (
            None,
            SamplingConfig(temperature=0.0, seed=index),
            SamplingConfig(temperature=0.9, seed=index),
            SamplingConfig(temperature=1.2, top_k=12, top_p=0.9, repetition_penalty=1.3, seed=index),
        )[rng.integers(4)]
        requests.append(
            Request(
                prompt_ids=tuple(rng.integers(2, 258, rng.integers(1, 61)).tolist()),
                max_new_tokens=int(rng.integers(1, 37)),
                sampling=sampling,
                eos_ids=tuple(rng.integers(0, 258, rng.integers(0, 9)).tolist()),
                stop=tuple(map(chr, rng.integers(33, 127, rng.integers(0, 9)))),
            )
        )
    return requests


class Failed:
    """A number that the device did not come to."""

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return True

    def __array__(self, *_, **__):
        return np.array([int(self)])

    def __int__(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")


class Collecting:
    """A learner that learns nothing: it keeps what it is given."""

    branches = 0

    def __init__(self):
        self.ended = []

    def take(self, ended, request):
        self.ended.append(jax.tree.map(jnp.copy, ended))  # the slots are used up

    def has_work(self):
        return False

    def turn(self, status, *, idle, settle):
        return None
