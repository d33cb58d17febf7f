"""The life of a job: every way through the table, and none beside it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegraft.common.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    JOB_STATE_UNSPECIFIED,
    JobState,
    JobStatus,
)
from services.core.errors import InvalidTransition
from services.core.jobs.progress import RateEstimate
from services.core.jobs.states import (
    TRANSITIONS,
    advance,
    claim,
    is_final,
    lease_expired,
    new_status,
    request_cancel,
    request_pause,
    request_resume,
)

STATES = JobState.values()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=30)


def test_the_table_is_the_documented_one() -> None:
    allowed = {
        (JOB_STATE_UNSPECIFIED, JOB_STATE_QUEUED),
        (JOB_STATE_QUEUED, JOB_STATE_RUNNING),
        (JOB_STATE_QUEUED, JOB_STATE_PAUSED),
        (JOB_STATE_QUEUED, JOB_STATE_CANCELLED),
        (JOB_STATE_PAUSED, JOB_STATE_QUEUED),
        (JOB_STATE_PAUSED, JOB_STATE_CANCELLED),
        (JOB_STATE_RUNNING, JOB_STATE_PAUSED),
        (JOB_STATE_RUNNING, JOB_STATE_QUEUED),
        (JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED),
        (JOB_STATE_RUNNING, JOB_STATE_FAILED),
        (JOB_STATE_RUNNING, JOB_STATE_CANCELLED),
    }
    assert set(TRANSITIONS) == set(STATES)
    assert {(start, to) for start in STATES for to in TRANSITIONS[start]} == allowed


@given(st.lists(st.tuples(st.sampled_from(STATES), st.timedeltas(timedelta(0), timedelta(days=1)))))
def test_any_sequence_of_wishes_keeps_the_invariants(wishes: list[tuple[JobState, timedelta]]) -> None:
    status, now = JobStatus(), NOW
    for to, pause in wishes:
        now += pause
        before = JobStatus()
        before.CopyFrom(status)
        if to in TRANSITIONS[status.state]:
            advance(status, to, now)
            assert status.state == to
        else:
            with pytest.raises(InvalidTransition):
                advance(status, to, now)
            assert status == before
        assert status.HasField("create_time") == (status.state != JOB_STATE_UNSPECIFIED)
        assert status.HasField("end_time") == (is_final(status) and status.state != JOB_STATE_UNSPECIFIED)
        if before.HasField("start_time"):
            assert status.start_time == before.start_time  # when it was first started
        if status.HasField("end_time"):
            assert status.create_time.ToDatetime() <= status.end_time.ToDatetime()


@given(
    st.lists(st.sampled_from(["claim", "wait", "finish", "cancel", "requeue", "pause", "resume", "stop"]), max_size=30)
)
def test_one_owner_at_a_time(steps: list[str]) -> None:
    status, now = new_status(NOW), NOW
    for number, step in enumerate(steps):
        epoch, held = status.epoch, status.state == JOB_STATE_RUNNING and not lease_expired(status, now)
        ended = is_final(status)
        match step:
            case "claim":
                if held or ended or status.state == JOB_STATE_PAUSED:
                    with pytest.raises(InvalidTransition):
                        claim(status, f"w{number}", LEASE, now)
                    assert status.epoch == epoch
                else:
                    claim(status, f"w{number}", LEASE, now)
                    assert (status.epoch, status.worker, status.state) == (epoch + 1, f"w{number}", JOB_STATE_RUNNING)
                    assert not lease_expired(status, now)
            case "wait":
                now += LEASE
                assert lease_expired(status, now) == (status.state == JOB_STATE_RUNNING)
            case "cancel":
                request_cancel(status, now)
                assert status.cancel_requested or ended
                assert status.state not in (JOB_STATE_QUEUED, JOB_STATE_PAUSED)
            case "pause" | "resume" if ended or status.cancel_requested:
                with pytest.raises(InvalidTransition):
                    (request_pause if step == "pause" else request_resume)(status, now)
            case "pause":
                request_pause(status, now)
                assert status.state == JOB_STATE_PAUSED or status.pause_requested
                assert status.state != JOB_STATE_QUEUED
            case "resume":
                request_resume(status, now)
                assert status.state in (JOB_STATE_QUEUED, JOB_STATE_RUNNING) and not status.pause_requested
            case "stop" if status.state == JOB_STATE_RUNNING:
                advance(status, JOB_STATE_CANCELLED if status.cancel_requested else JOB_STATE_PAUSED, now)
                assert not status.worker
            case "finish" | "requeue" if status.state == JOB_STATE_RUNNING:
                advance(status, JOB_STATE_SUCCEEDED if step == "finish" else JOB_STATE_QUEUED, now)
                assert not status.worker
                assert not status.HasField("lease_expire_time")
        assert status.epoch >= epoch
        if status.pause_requested:
            assert status.state in (JOB_STATE_RUNNING, JOB_STATE_QUEUED)


def test_cancelling_what_has_ended_changes_nothing() -> None:
    for final in (JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED):
        status = JobStatus(state=final)
        request_cancel(status)
        assert status == JobStatus(state=final)


# --- progress ---------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1e4), st.floats(0.05, 5), st.integers(25, 60))
def test_a_steady_rate_is_found(rate: float, pause: float, steps: int) -> None:
    estimate = RateEstimate()
    found = None
    for number in range(steps):
        found = estimate.add("steps", number * pause * rate, number * pause)
    assert found == pytest.approx(rate, rel=1e-6)


def test_nothing_is_said_too_soon_or_after_a_change_of_unit() -> None:
    estimate = RateEstimate()
    assert [estimate.add("files", number, number * 0.1) for number in range(5)] == [None] * 5  # not yet a second
    assert estimate.add("files", 20, 2.0) is not None
    assert estimate.add("steps", 21, 3.0) is None  # another unit
    assert estimate.add("steps", 3, 4.0) is None  # back: begun anew
    assert estimate.add("steps", 3, 14.0) is None  # time passed, but no step forward was seen
    assert estimate.add("steps", 3, 24.0) is None


def test_a_slower_phase_is_followed() -> None:
    estimate = RateEstimate()
    done = 0.0
    for second in range(60):
        done += 10
        estimate.add("steps", done, second)
    found: float | None = None
    for second in range(60, 120):
        done += 1
        found = estimate.add("steps", done, second)
    assert found == pytest.approx(1.0, rel=0.6)
