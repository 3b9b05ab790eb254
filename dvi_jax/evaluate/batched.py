"""Runs questions many at a time, through engines: acceptance, equality and speed under load.

Turn by turn, all conversations that have one: their prompts by the plan first, then the very same ones plainly. A
generation's seconds are those from its first token to its last, beside the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dvi_jax.config import DecodeConfig
from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.decode.plan import PLAIN as PLAIN_PLAN
from dvi_jax.decode.plan import rows_alike
from dvi_jax.decode.prefill import cache_slots
from dvi_jax.evaluate.runner import NO_TOKENIZER, Answered, TimedGeneration, conversation_prompt
from dvi_jax.evaluate.spec_bench import Question
from dvi_jax.evaluate.trace import FASTEST, PLAIN, SPECULATIVE
from dvi_jax.loading import LoadedModel
from dvi_jax.mesh import check_batch, replicas
from dvi_jax.processes import is_first, told
from dvi_jax.serve.engine import Engine
from dvi_jax.serve.many import Decoded, decode_many, open_engine
from dvi_jax.serve.plans import plans_of
from dvi_jax.serve.requests import Request


class BatchedDecoder:
    """Decodes so many prompts at a time, by a plan, and plainly in passes of the same bits.

    And plainly one row wide, where that is another row class: the fastest plain decoding.
    """

    def __init__(self, model: LoadedModel, settings: DecodeConfig, plan: str, slots: int):
        """`plan`: as an engine takes it. Of `settings` the length of answers counts. `UserError` for a wrong plan."""
        check_batch(model.definition.mesh, slots, "slots")
        self.model, self.settings, self._slots = model, settings, slots
        _, self.width = plans_of(model, plan, slots)
        self._modes = {SPECULATIVE: (plan, self.width), PLAIN: (str(PLAIN_PLAN), self.width)}
        rows = slots // replicas(model.definition.mesh) * self.width  # of each device
        if self.width > 1 and not rows_alike(rows, model.config, model.manifest.dtype):
            self._modes[FASTEST] = (str(PLAIN_PLAN), 1)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises `UserError` where the checkpoint has none."""
        return self.model.need_tokenizer(NO_TOKENIZER)

    def run(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Hold every conversation, all of them at once; they come when all are over.

        Of several processes the first one holds them, and the others run what it decodes with: none come of it.
        """
        if not is_first():
            self._follow()
            return
        found = [Answered(question, [], [], []) for question in questions]
        messages: list[list[Message]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            prompts: dict[int, list[int]] = {}
            for index, answered in enumerate(found):
                if turn >= len(answered.question.turns) or answered.skipped:
                    continue
                messages[index].append(Message("user", answered.question.turns[turn]))
                prompt = conversation_prompt(self, messages[index])
                if isinstance(prompt, str):
                    answered.skip_from(turn, prompt)
                else:
                    prompts[index] = prompt
            timed = {mode: self._decode(list(prompts.values()), mode) for mode in self._modes}
            for place, (index, prompt) in enumerate(prompts.items()):
                modes = {mode: generations[place] for mode, generations in timed.items()}
                found[index].add(turn, prompt, modes, self.tokenizer)
                messages[index].append(Message("assistant", found[index].texts[-1]))
        told(lambda: None)  # that no further engine is opened
        yield from found

    def _follow(self) -> None:
        while (opened := told(lambda: None)) is not None:
            with self._open_engine(*opened) as engine:
                engine.follow()

    def _decode(self, prompts: Sequence[Sequence[int]], mode: str) -> list[TimedGeneration]:
        """All prompts in one mode."""
        if not prompts:
            return []
        longest = max(map(len, prompts))
        told(lambda: [mode, longest])
        with self._open_engine(mode, longest) as engine:
            requests = [Request(tuple(prompt), self.settings.max_new_tokens) for prompt in prompts]
            return [_timed(decoded, engine.context) for decoded in decode_many(engine, requests)]

    def _open_engine(self, mode: str, longest: int) -> Engine:
        plan, width = self._modes[mode]
        context = cache_slots(longest + self.settings.max_new_tokens)
        shape = {"slots": self._slots, "context": context, "longest_prompt": longest}
        return open_engine(self.model, **shape, plan=plan, width=width, warm_up=True)


def _timed(decoded: Decoded, context: int) -> TimedGeneration:
    statistics = decoded.statistics
    return TimedGeneration(
        decoded.generation,
        context,
        prefill_seconds=statistics.first_token - statistics.started,
        seconds=statistics.finished - statistics.first_token,
    )
