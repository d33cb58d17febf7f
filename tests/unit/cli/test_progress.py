"""Progress for people: the job's own estimate, or none."""

from __future__ import annotations

import pytest

from codegraft.common.v1.job_pb2 import JobState, Progress
from services.cli.progress import count, time_left
from services.client.words import duration, state_word


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (599, "9 min 59 s"),
        (3_000, "50 min"),
        (7_260, "2 h 01 min"),
        (90_000, "25 h 00 min"),
        (216_000, "2.5 days"),
    ],
)
def test_durations_have_no_false_precision(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_estimate_is_a_dash() -> None:
    assert time_left(Progress(done=1, total=2)) == "-"
    assert time_left(Progress(eta_seconds=0)) == "about 0 s left"


def test_counts() -> None:
    assert count(Progress(done=1200, total=2400, unit="files")) == "1,200/2,400 files"
    assert count(Progress(done=3, unit="files")) == "3 files"
    assert count(Progress()) == ""


def test_states_are_words() -> None:
    assert {state_word(state) for state in JobState.values()} >= {"queued", "running", "succeeded", "failed"}
