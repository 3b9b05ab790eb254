"""`/metrics`: what Prometheus reads. Names are vLLM's behind the prefix `dvi_` (docs/serving.md has the table).

Gauges and counters are the engine's own, read when they are asked for; histograms are filled as requests end. What is
not measured is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dvi_jax.serve.exchange import Exchange
from dvi_jax.serve.monitor import Monitor
from dvi_jax.serve.requests import EngineStatus, ReplyPiece

LABEL = "model_name"
# Seconds: from a tiny model's token to a long reply's end.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
TOKENS_PER_ROUND = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0)


class Metrics:
    """The registry of one server; other parts may register collectors of their own with it."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus], monitor: Monitor):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(model_name, status, monitor))

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"dvi_{name}", about, [LABEL], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first text", LONG)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of a reply", SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end of the answer", LONG)
        self._queue = histogram("request_queue_time_seconds", "From submission to a slot", LONG)
        self._per_round = histogram("request_tokens_per_round", "Tokens that a reply's rounds gave", TOKENS_PER_ROUND)
        names = [LABEL, "finished_reason"]
        self._finished = Counter("dvi_request_success", "Replies by how they ended", names, registry=self.registry)
        self._drafted = Counter(
            "dvi_spec_decode_num_draft_tokens", "Tokens drafted for ended replies", [LABEL], registry=self.registry
        ).labels(model_name)
        self._answers = Counter("dvi_http_responses", "Answers by status", [LABEL, "status"], registry=self.registry)
        self._model_name = model_name

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def saw_piece(self, piece: ReplyPiece, seconds: float) -> None:
        """A piece of a reply came so long after the one before it: each of its tokens is given its share."""
        for _ in piece.ids:
            self._gap.observe(seconds / len(piece.ids))

    def ended(self, exchange: Exchange) -> None:
        """Count a request that is over."""
        self._answers.labels(self._model_name, str(exchange.status)).inc()
        if not exchange.handles:
            return
        self._whole.observe(exchange.ended - exchange.arrived)
        if exchange.first_text is not None:
            self._first_token.observe(exchange.first_text - exchange.arrived)
        for reason in exchange.finish_reasons:
            self._finished.labels(self._model_name, reason).inc()
        for handle in exchange.handles:
            statistics = handle.statistics
            if statistics.started:
                self._queue.observe(statistics.started - statistics.submitted)
            if statistics.rounds:
                self._per_round.observe(statistics.new_tokens / statistics.rounds)
                self._drafted.inc(statistics.drafted)


class EngineCollector(Collector):
    """The engine's counters at the moment of a scrape."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus], monitor: Monitor):
        self._model_name, self._status, self._monitor = model_name, status, monitor

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would read the engine for it at start."""
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._status()
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Replies that hold a slot", now.running),
            "num_requests_waiting": ("Replies that wait for one", now.waiting),
            "slots": ("Replies that can run at once", now.slots),
            "acceptance_alarm": ("1 while drafts are accepted far less than at best", self._monitor.alarm is not None),
        }
        for name, (about, value) in gauges.items():
            yield self._family(GaugeMetricFamily, name, about, [((), value)])
        counters: dict[str, tuple[str, float]] = {
            "prompt_tokens": ("Tokens of prompts", now.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that were taken over from earlier ones", now.cached_tokens),
            "generation_tokens": ("Tokens of replies", now.new_tokens),
            "spec_decode_num_drafts": ("Rounds, those of all slots counted each", now.rounds),
            "spec_decode_num_judged_tokens": ("Drafts up to and with a round's first reject", sum(now.judged)),
            "spec_decode_num_accepted_tokens": ("Drafts accepted", sum(now.accepted)),
            "slot_rounds": ("Rounds that were computed for slots, for those without a reply too", now.slot_rounds),
            "engine_busy_seconds": ("Of the engine's thread, while there were requests", now.busy_seconds),
            "engine_waited_seconds": ("Of these, waiting for the device", now.waited_seconds),
            "engine_handed_seconds": ("Of these, giving it programs", now.handed_seconds),
            "engine_intake_seconds": ("Of these, taking prompts in", now.intake_seconds),
            "engine_learner_seconds": ("Of the engine's thread, besides: turns of the learner", now.learner_seconds),
            "stretches": ("Times that the device ran rounds without the host", now.stretches),
        }
        for name, (about, value) in counters.items():
            yield self._family(CounterMetricFamily, name, about, [((), value)])
        for name, about, values in (
            ("spec_decode_num_judged_tokens_per_pos", "Drafts judged, by their position in the round", now.judged),
            ("spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by position", now.accepted),
        ):
            samples = [((str(position),), value) for position, value in enumerate(values)]
            yield self._family(CounterMetricFamily, name, about, samples, "position")

    def _family(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        about: str,
        samples: Sequence[tuple[tuple[str, ...], float]],
        *labels: str,
    ) -> Metric:
        family = kind(f"dvi_{name}", about, labels=[LABEL, *labels])
        for values, value in samples:
            family.add_metric([self._model_name, *values], value)
        return family
