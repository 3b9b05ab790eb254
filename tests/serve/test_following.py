"""Many prompts decoded by several processes: the others open the engines that the first one opens, in its order.

The processes are made up: what the first one tells is noted, and then heard by the other. Engines are stand-ins.
"""

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from dvi_jax import generate_file
from dvi_jax.config import DecodeConfig, SamplingConfig
from dvi_jax.decode.batch import Generation
from dvi_jax.evaluate import batched
from dvi_jax.evaluate.spec_bench import Question
from dvi_jax.generate_file import Decoding, Line, answer_file, follow_answers
from dvi_jax.learn import replies
from dvi_jax.learn.replies import ReplyConfig, follow_replies, make_replies
from dvi_jax.serve.many import Decoded
from dvi_jax.serve.requests import Statistics


class Processes:
    """Runs what the first process does, then what another does."""

    def __init__(self, monkeypatch, module):
        self.told, self.opened, self.module, self.patch = deque(), [], module, monkeypatch
        monkeypatch.setattr(module, "open_engine", self.open_engine)
        monkeypatch.setattr(module, "decode_many", self.decode_many)

    @contextmanager
    def open_engine(self, model, **shape):
        self.opened.append(shape)
        yield SimpleNamespace(follow=lambda: None, context=shape["context"])

    def decode_many(self, engine, requests):
        for request in requests:
            ids = [*request.prompt_ids, 5, 6, 7]
            yield Decoded(Generation(ids, ids[-3:], [1, 1], [0, 0], "length"), "abc", Statistics())

    def compare(self, first, other):
        """What each opens, which has to be the same; nothing of what was told is left over."""
        self.opened = []
        self.patch.setattr(self.module, "told", lambda make: self.told.append(make()) or self.told[-1])
        self.patch.setattr(self.module, "is_first", lambda: True, raising=False)
        first()
        opened, self.opened = self.opened, []
        self.patch.setattr(self.module, "told", lambda make: self.told.popleft())
        self.patch.setattr(self.module, "is_first", lambda: False, raising=False)
        other()
        assert self.opened == opened
        assert not self.told
        return opened


LINES = [Line(0, [5, 9]), Line(1, [], "a fault"), Line(2, list(range(2, 30))), Line(3, [7])]


@pytest.mark.parametrize(
    ("kept", "engines", "plan", "sampling"),
    [(0, 1, "tree:4", SamplingConfig(seed=7)), (2, 1, "chain:2", None), (4, 0, "auto", None)],
)
def test_files_of_prompts(model, tmp_path, monkeypatch, kept, engines, plan, sampling):
    """From the beginning, from where a file was cut, and where nothing is left to do."""
    decoding = Decoding(plan, plain=False, max_new_tokens=3, eos_ids=(), sampling=sampling, stop=(), slots=2)
    output = tmp_path / "out.jsonl"
    processes = Processes(monkeypatch, generate_file)

    def first():
        assert answer_file(model, LINES, output, decoding) == (kept < 2)

    with monkeypatch.context() as patch:
        patch.setattr(generate_file, "told", lambda make: make())
        answer_file(model, LINES, output, decoding)
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
    opened = processes.compare(first, lambda: follow_answers(model, LINES, decoding))
    assert [shape["plan"] for shape in opened] == [plan] * engines
    assert output.read_bytes() == whole


def test_own_replies(model, tmp_path, monkeypatch):
    """Length classes with an engine of their own; those that are kept from before are not opened."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 258, length).tolist() for length in (3, 4, 5, 20, 21, 60)]
    config = ReplyConfig(lengths=(8, 32, 64), new_tokens=4, batch_tokens=64)
    arguments = model, prompts, tmp_path / "replies.npz", config, 80
    processes = Processes(monkeypatch, replies)

    def compare():
        opened = processes.compare(lambda: make_replies(*arguments), lambda: follow_replies(model, prompts, config))
        return sorted(shape["longest_prompt"] for shape in opened)

    assert compare() == [8, 32, 64]

    kept = replies.Journal(arguments[2], replies._purpose(model, replies.deal_all(prompts, config), config))
    kept.add(0, [([2, 3, 4], 1)])
    assert compare() == [32, 64]


def test_evaluation(model, monkeypatch):
    """Each turn in every mode: the others know neither its prompts nor when it is the last."""
    questions = [Question(1, "qa", ("why?", "and why is that so?")), Question(2, "qa", ("how?",))]
    processes = Processes(monkeypatch, batched)
    first, other = (batched.BatchedDecoder(model, DecodeConfig(max_new_tokens=3), "chain:2", 2) for _ in range(2))
    found = []
    opened = processes.compare(lambda: found.extend(first.run(questions)), lambda: found.extend(other.run(questions)))
    assert [answered.question.question_id for answered in found] == [1, 2]
    assert len(opened) == 2 * len(first._modes)
    assert opened[0]["context"] <= opened[-1]["context"]
