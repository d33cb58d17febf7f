"""Spans and the way they travel, whether they are recorded or not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from services.core import errors
from services.core.telemetry import tracing
from tests.spans import Recorder, recording

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as found:
        yield found


def parts(traceparent: str) -> tuple[str, str, str]:
    version, trace, span, flags = traceparent.split("-")
    assert version == "00" and len(trace) == 32 and len(span) == 16
    return trace, span, flags


def test_without_recording_ids_go_on_with_a_span_of_ours_and_the_flags() -> None:
    with tracing.span("served", SpanKind.SERVER, PARENT.replace("-01", "-00")):
        trace, span, flags = parts(tracing.traceparent())
        assert (trace, flags) == ("ab" * 16, "00") and span != "cd" * 8
        with tracing.span("inner"):
            assert parts(tracing.traceparent())[0] == trace
            assert parts(tracing.traceparent())[1] != span
    assert tracing.traceparent() == ""
    with tracing.span("nobody asked"):
        assert tracing.traceparent() == ""
    assert tracing.took("never recorded", 1.0) == ""


@pytest.mark.parametrize(
    "broken", ["", "nonsense", f"00-{'0' * 32}-{'cd' * 8}-01", f"00-{'ab' * 16}-{'0' * 16}-01", PARENT + "-more"]
)
def test_a_broken_trace_is_replaced_by_a_new_one(broken: str, recorder: Recorder) -> None:
    for _ in range(2):  # recorded, and then not
        with tracing.span("outer", parent=PARENT), tracing.span("served", parent=broken):
            trace, _, flags = parts(tracing.traceparent())
            assert int(trace, 16) and trace != "ab" * 16
            assert int(flags, 16) & 1, "sampled"
        tracing.use(None)


async def test_a_span_is_that_of_the_tasks_it_starts(recorder: Recorder) -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return tracing.traceparent()

    with tracing.span("a", parent=PARENT):
        started = asyncio.create_task(work())
    with tracing.span("b"):
        assert parts(await started)[0] == "ab" * 16 != parts(tracing.traceparent())[0]


def test_who_is_whose_child(recorder: Recorder) -> None:
    about = {"codegraft.job": "j"}
    with tracing.span("served", SpanKind.SERVER, PARENT, about), tracing.under(""), tracing.span("step"):
        tracing.took("measured", 2.5, links=[PARENT, "nonsense"], attributes={"steps": 3})
    measured, step, served = recorder.spans()
    assert [span.name for span in (measured, step, served)] == ["measured", "step", "served"]
    assert parent(measured) == id_of(step) and parent(step) == id_of(served) and parent(served) == int("cd" * 8, 16)
    assert {span.context.trace_id for span in recorder.spans()} == {int("ab" * 16, 16)}
    assert served.kind is SpanKind.SERVER and served.attributes == {"codegraft.job": "j"}
    assert measured.end_time and measured.start_time
    assert (measured.end_time - measured.start_time) / 1e9 == pytest.approx(2.5)
    assert [link.context.span_id for link in measured.links] == [int("cd" * 8, 16)]


def test_a_failure_is_told_by_its_reason_alone(recorder: Recorder) -> None:
    for error in (errors.StoreUnavailable("cg_1_secret"), ZeroDivisionError("cg_1_secret")):
        with pytest.raises(type(error)), tracing.span("failing"):
            raise error
    with tracing.span("told"):
        tracing.failed(errors.EmptyDataset("cg_1_secret"))
    reasons = [(span.status.status_code, span.status.description) for span in recorder.spans()]
    expected = ["STORE_UNAVAILABLE", "ZeroDivisionError", "EMPTY_DATASET"]
    assert reasons == [(StatusCode.ERROR, reason) for reason in expected]
    assert "secret" not in "".join(span.to_json() for span in recorder.spans())


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def id_of(span: ReadableSpan) -> int:
    return span.context.span_id
