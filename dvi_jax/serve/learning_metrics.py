"""What Prometheus reads of a server that learns, beside its other metrics (docs/serving.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dvi_jax.serve.learned import Learned
from dvi_jax.serve.metrics import LABEL


class LearningCollector(Collector):
    """The learner's counters at the moment of a scrape."""

    def __init__(self, model_name: str, status: Callable[[], Learned]):
        self._model_name, self._status = model_name, status

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would read the learner for it at start."""
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._status()
        counters = {
            "learning_updates": ("Updates of the drafter", now.updates),
            "learning_swaps": ("Times that other weights went live", now.swaps),
            "learning_rollbacks": ("Times that weights were taken back", now.rollbacks),
            "learning_positions": ("Positions that updates looked at", now.learned_positions),
            "learning_windows": ("Replies kept to be learned from", now.windows),
            "learning_seconds": (
                "Seconds of learning, an update counted as long as the device takes for one",
                now.seconds,
            ),
        }
        gauges = {
            "learning_update_seconds": ("An update, on a device that does nothing else", now.update_seconds),
            "learning_agreement": ("Share of its positions where drafter and verifier chose alike", now.agreement),
            "learning_active": ("0 once learning has stopped", float(now.state == "learning")),
            "live_drafter_age_seconds": ("Since the live drafter's weights went live", time.time() - now.live_since),
        }
        yield from (self._family(CounterMetricFamily, name, *family) for name, family in counters.items())
        yield from (self._family(GaugeMetricFamily, name, *family) for name, family in gauges.items())
        about = "Always 1; the label is a checksum of the live drafter's weights"
        info = GaugeMetricFamily("dvi_live_drafter_info", about, labels=[LABEL, "digest"])
        info.add_metric([self._model_name, now.digest], 1)
        yield info

    def _family(
        self, kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, about: str, value: float
    ) -> Metric:
        family = kind(f"dvi_{name}", about, labels=[LABEL])
        family.add_metric([self._model_name], value)
        return family
