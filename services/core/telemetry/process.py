"""Telemetry of one process: spans to a collector, figures on a port of its own. Both are off unless settings say so."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from prometheus_client import ProcessCollector, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.core import log
from services.core.config import CoreSettings
from services.core.errors import Unavailable
from services.core.telemetry import metrics, tracing

EXPORT_SECONDS = 5
"""Longest time for spans to reach the collector, also at the process's end, which must not wait for long."""
_STANDARD = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

INFO = metrics.gauge("codegraft_service_info", "The service and its version; always 1.", "service", "version")
CACHE_FREE = metrics.collected("codegraft_cache_free_bytes", "Free bytes of the disk that the local cache lies on.")
CACHE_SIZE = metrics.collected("codegraft_cache_size_bytes", "All bytes of the disk that the local cache lies on.")
STARTED = metrics.collected("process_start_time_seconds", "When the process started, as Unix time.")

logger = log.get(__name__)


@contextmanager
def telling(service: str, settings: CoreSettings) -> Iterator[None]:
    """Tells what the settings ask for, for the time of the block.

    Raises:
        Unavailable: the port of the figures is taken.
    """
    with _spans(service, settings), _figures(service, settings):
        yield


@contextmanager
def _spans(service: str, settings: CoreSettings) -> Iterator[None]:
    wanted = settings.otlp_endpoint or any(os.environ.get(name) for name in _STANDARD)
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        yield
        return
    # Here, for it costs a third of a second that only those pay who want it.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"codegraft-{service}",
            "service.version": _version(),
            "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        }
    )
    provider = TracerProvider(resource=resource)
    # None leaves it to the standard variables; so are headers, certificates and the sampler.
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint or None, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracing.use(provider)
    logger.info("spans are exported", to=settings.otlp_endpoint or "as the OTEL_ variables say")
    try:
        yield
    finally:
        tracing.use(None)
        provider.shutdown()


@contextmanager
def _figures(service: str, settings: CoreSettings) -> Iterator[None]:
    if not settings.metrics_listen:
        yield
        return
    INFO.labels(service, _version()).set(1)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    collectors: list[Collector] = [_Cache(settings.cache_dir), ProcessCollector(registry=None)]
    host, _, port = settings.metrics_listen.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), metrics.REGISTRY)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {settings.metrics_listen}: {error.strerror}",
            field="CODEGRAFT_METRICS_LISTEN",
            hint="Another process has the port, or the host is not this machine's; port 0 takes a free one.",
        ) from None
    for collector in collectors:
        metrics.register(collector)
    logger.info("figures can be read", url=f"http://{host}:{server.server_port}/metrics")
    try:
        yield
    finally:
        for collector in collectors:
            metrics.unregister(collector)
        server.shutdown()
        server.server_close()


class _Cache(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Free and whole size of the disk; nothing before the folder is there."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return
        yield CACHE_FREE.read([((), usage.free)])
        yield CACHE_SIZE.read([((), usage.total)])

    def describe(self) -> Iterable[Metric]:
        return []


def _version() -> str:
    return metadata.version("codegraft")
