"""How figures are made: one registry of the process, one table of what is in it, labels that stay few.

Where counting costs nothing it is done at once (a histogram's observation is about a microsecond); what is counted
anyway, as in the engine, is read when Prometheus asks. The table is what docs/telemetry.md, the dashboards and the
alert rules are held against.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()
"""What a scrape gives."""

SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds; of what somebody waits for."""
LONG = (0.1, 1.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)
"""Seconds; of jobs."""

MOST_PROJECTS = 50
"""Projects with figures of their own in one process; all others are "other" together."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Family:
    """One figure: its name, and what it says."""

    name: str
    """As Prometheus has it; of a histogram without _bucket, _sum and _count."""
    help: str
    labels: tuple[str, ...] = ()
    kind: Literal["counter", "gauge", "histogram"] = "gauge"

    def read(self, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
        """Its values at this moment, for a collector: those of its labels, and the value."""
        made: CounterMetricFamily | GaugeMetricFamily = (
            CounterMetricFamily(self.name, self.help, labels=self.labels)
            if self.kind == "counter"
            else GaugeMetricFamily(self.name, self.help, labels=self.labels)
        )
        for labels, value in samples:
            made.add_metric(labels, value)
        return made


FAMILIES: dict[str, Family] = {}
"""Every figure of the modules that are loaded, by name."""


def counter(name: str, help: str, *labels: str) -> Counter:
    """A figure that only grows; its name ends with _total."""
    _enter(Family(name, help, labels, "counter"))
    return Counter(name, help, labels, registry=REGISTRY)


def gauge(name: str, help: str, *labels: str) -> Gauge:
    """A figure that goes up and down."""
    _enter(Family(name, help, labels))
    return Gauge(name, help, labels, registry=REGISTRY)


def histogram(name: str, help: str, *labels: str, buckets: Sequence[float] = SHORT) -> Histogram:
    """How often, and how long."""
    _enter(Family(name, help, labels, "histogram"))
    return Histogram(name, help, labels, buckets=buckets, registry=REGISTRY)


def collected(name: str, help: str, *labels: str, kind: Literal["counter", "gauge"] = "gauge") -> Family:
    """A figure that a collector reads when it is asked for; see :func:`register`."""
    return _enter(Family(name, help, labels, kind))


def register(collector: Collector) -> None:
    """Has a collector asked at every scrape, from another thread, until :func:`unregister`."""
    REGISTRY.register(collector)


def unregister(collector: Collector) -> None:
    """Forgets a collector; one that is not there is fine."""
    with contextlib.suppress(KeyError):
        REGISTRY.unregister(collector)


class Labels:
    """Keeps the values of one label few, whoever names them: the first ones, then "other"."""

    def __init__(self, most: int = MOST_PROJECTS) -> None:
        self._most = most
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def of(self, value: str) -> str:
        """What the label says for a value; of a project's name its id."""
        value = value.removeprefix("projects/")
        if value in self._known:
            return value
        with self._lock:
            if len(self._known) < self._most:
                self._known.add(value)
        return value if value in self._known else OTHER

    def known(self) -> list[str]:
        """The values that have a label of their own."""
        return sorted(self._known)


PROJECTS = Labels()
"""Of the label ``project``."""


def _enter(family: Family) -> Family:
    FAMILIES[family.name] = family
    return family
