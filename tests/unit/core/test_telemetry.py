"""Telemetry of a process: what is told where, and only when the settings ask for it."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from codegraft.common.v1.job_pb2 import JOB_STATE_PAUSED, JOB_STATE_RUNNING
from services.core import log
from services.core.config import CoreSettings
from services.core.errors import StoreUnavailable, Unavailable
from services.core.jobs import new_status
from services.core.jobs.states import advance, request_cancel
from services.core.jobs.tally import Tally
from services.core.telemetry import figures, metrics, process, tracing
from services.core.telemetry.metrics import OTHER, Labels


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process._STANDARD:
        monkeypatch.delenv(name, raising=False)


def settings(**fields: Any) -> CoreSettings:
    return CoreSettings(**fields)


def urls(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    return re.findall(r"http://127\.0\.0\.1:\d+/metrics", out + err)


def test_nothing_is_told_unless_settings_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with process.telling("scanner", settings()):
        assert not tracing.is_on() and not urls(capsys)


def test_figures_are_served_as_long_as_the_process_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with process.telling("scanner", settings(metrics_listen="127.0.0.1:0", cache_dir=tmp_path)):
        [url] = urls(capsys)
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        assert re.search(r'^codegraft_service_info\{service="scanner",version="[0-9.]+"\} 1.0$', text, re.M)
        assert re.search(r"^process_start_time_seconds \d", text, re.M)
        assert re.search(r"^codegraft_cache_free_bytes \d", text, re.M)
        assert "_created" not in text, "twice as many series, of no use"
        taken = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(Unavailable) as caught, process.telling("x", settings(metrics_listen=taken)):
            pass
        assert caught.value.field == "CODEGRAFT_METRICS_LISTEN"
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server, servicer = grpc.server(futures.ThreadPoolExecutor(1)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("by_variable", [False, True])
def test_spans_reach_the_collector_before_the_process_ends(
    by_variable: bool, collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, url = collector
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with process.telling("trainer", settings(otlp_endpoint="" if by_variable else url)):
        with tracing.span("run"):
            pass
        assert tracing.is_on()
    assert not tracing.is_on()
    [request] = servicer.requests
    [of_resource] = request.resource_spans
    resource = {one.key: one.value.string_value for one in of_resource.resource.attributes}
    assert resource["service.name"] == "codegraft-trainer"
    assert [span.name for scope in of_resource.scope_spans for span in scope.spans] == ["run"]


def test_an_unfit_endpoint_is_refused() -> None:
    for wrong in ("127.0.0.1:4317", "http://user:password@host:4317", "http://host:4317/v1"):
        with pytest.raises(ValueError):
            settings(otlp_endpoint=wrong)
    with pytest.raises(ValueError):
        settings(metrics_listen="9090")


def test_a_label_has_few_values_whoever_names_them() -> None:
    labels = Labels(most=3)
    said = [labels.of(f"projects/p{number}") for number in range(1000)]
    assert said[:3] == ["p0", "p1", "p2"] and set(said[3:]) == {OTHER}
    assert labels.of("p1") == "p1" and labels.known() == ["p0", "p1", "p2"]


def value(name: str, **labels: str) -> float:
    found = metrics.REGISTRY.get_sample_value(name, labels)
    return -1.0 if found is None else found


def test_jobs_are_counted_until_they_end() -> None:
    tally = Tally("kind-of-this-test")
    metrics.register(tally)
    statuses = [new_status() for _ in range(4)]
    for number, status in enumerate(statuses):
        tally.see(f"jobs/{number}", status)
    advance(statuses[0], JOB_STATE_RUNNING)
    advance(statuses[1], JOB_STATE_PAUSED)
    request_cancel(statuses[2])
    for number, status in enumerate(statuses):
        tally.see(f"jobs/{number}", status)
    counts = {s: value("codegraft_jobs", kind="kind-of-this-test", state=s) for s in ("QUEUED", "RUNNING", "PAUSED")}
    assert counts == {"QUEUED": 1, "RUNNING": 1, "PAUSED": 1}
    oldest = "codegraft_job_oldest_queued_timestamp_seconds"
    created = statuses[3].create_time.ToNanoseconds() / 1e9
    assert value(oldest, kind="kind-of-this-test") == pytest.approx(created)
    tally.forget("jobs/3")
    assert value(oldest, kind="kind-of-this-test") == 0
    metrics.unregister(tally)
    metrics.unregister(tally)
    assert value(oldest, kind="kind-of-this-test") == -1


def test_parts_are_counted_by_how_they_end() -> None:
    def count(outcome: str) -> float:
        return value("codegraft_part_seconds_count", kind="part-of-this-test", outcome=outcome)

    with figures.timed_part("part-of-this-test"):
        pass
    for error in (StoreUnavailable("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), figures.timed_part("part-of-this-test"):
            raise error
    assert count("MADE") == count("STORE_UNAVAILABLE") == count("INTERRUPTED") == 1


def test_every_line_within_a_span_says_which() -> None:
    with structlog.testing.capture_logs(processors=[log.add_span]) as lines:
        with tracing.span("served", parent=f"00-{'ab' * 16}-{'cd' * 8}-01"):
            log.get("x").info("within")
            ours = tracing.traceparent().split("-")[2]
        log.get("x").info("outside")
    within, outside = lines
    assert (within["trace_id"], within["span_id"]) == ("ab" * 16, ours)
    assert "trace_id" not in outside
