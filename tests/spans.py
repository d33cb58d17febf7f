"""Records spans in memory, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.core.telemetry import tracing


class Recorder:
    """What was recorded so far."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def spans(self) -> tuple[ReadableSpan, ...]:
        """In the order of their ends."""
        return self.exporter.get_finished_spans()

    def of(self, trace_id: str) -> list[ReadableSpan]:
        """Those of one trace."""
        return [span for span in self.spans() if span.context.trace_id == int(trace_id, 16)]


@contextmanager
def recording() -> Iterator[Recorder]:
    """Spans of this process are recorded within the block."""
    recorder, provider = Recorder(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(recorder.exporter))
    tracing.use(provider)
    try:
        yield recorder
    finally:
        tracing.use(None)
