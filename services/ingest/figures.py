"""Ingest's figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from codegraft.ingest.v1.source_pb2 import Source, SourceState
from services.core.telemetry.metrics import LONG, collected, counter, histogram

SOURCES = collected("codegraft_ingest_sources", "Sources by state. Every replica tells all: take the largest.", "state")
FETCH_SECONDS = histogram(
    "codegraft_ingest_fetch_seconds",
    "Fetches of sources by this process, and how long they took, by how they ended: FETCHED, or the reason why not.",
    "outcome",
    buckets=LONG,
)
FETCHED_FILES = counter("codegraft_ingest_files_total", "Files of the sources that were fetched, new or not.")
STORED_BYTES = counter("codegraft_ingest_stored_bytes_total", "Bytes of new contents that fetches have stored.")


class States(Collector):
    """Counts the sources by state.

    Args:
        seen: by name; read while others change it.
    """

    def __init__(self, seen: Mapping[str, Source]) -> None:
        self._seen = seen

    def collect(self) -> Iterable[Metric]:
        """Called from the scrape's thread."""
        counts: Counter[int] = Counter(source.state for source in list(self._seen.values()))
        states = [(name, number) for name, number in SourceState.items() if number]
        yield SOURCES.read(((name.removeprefix("SOURCE_STATE_"),), counts[number]) for name, number in states)
