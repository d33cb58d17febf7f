"""docs/architecture.md: its tables, its diagram and its numbers are those of the code."""

from __future__ import annotations

import inspect
import re
from datetime import timedelta

from codegraft.common.v1.job_pb2 import JobState
from services.core.audit import nats as audit
from services.core.events import nats as events
from services.core.jobs import context, runner
from services.core.jobs.states import TRANSITIONS
from services.inference.config import InferenceSettings
from services.inference.engine.blocks import BLOCK
from services.scanner.part_worker import EXAMINE_FILES
from tools import inner_subjects
from tools.contract import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def word(state: JobState) -> str:
    return JobState.Name(state).removeprefix("JOB_STATE_")


def test_the_diagram_is_the_table_of_transitions() -> None:
    drawn = set(re.findall(r"^  ([A-Z]+) --> ([A-Z]+)", PAGE, re.M))
    allowed = {(word(a), word(b)) for a, after in TRANSITIONS.items() for b in after}
    assert drawn == {(a, b) for a, b in allowed if a != "UNSPECIFIED"}


def test_buckets_and_streams_are_those_of_the_code() -> None:
    assert set(re.findall(r"KV bucket `(\w+)`", PAGE)) == set(inner_subjects.RECORDS)
    named = set(re.findall(r"`(JOBS|JOBS_DEAD|EVENTS|AUDIT)`", PAGE))
    assert named == {name for name in inner_subjects.streams() if not name.startswith("KV_")}
    assert f"stream `EVENTS`, {events.KEPT.days} days" in PAGE and f"stream `AUDIT`, {audit.KEPT.days} days" in PAGE


def test_numbers_are_those_of_the_code() -> None:
    defaults = {name: one.default for name, one in inspect.signature(runner.JobRunner.__init__).parameters.items()}
    assert defaults["lease"] == timedelta(seconds=30) and "a lease of 30 seconds, and renews that every ten" in PAGE
    assert defaults["max_attempts"] == 3 and "three attempts in all" in PAGE
    assert f"{EXAMINE_FILES} files for the rules" in PAGE and f"blocks of {BLOCK} tokens" in " ".join(PAGE.split())
    seconds = InferenceSettings.model_fields["inference_reconcile_seconds"].default
    assert f"asking every {seconds} seconds" in PAGE
    assert timedelta(minutes=2) == context.OUTAGE and "(two minutes)" in PAGE


def test_the_rooms_are_there() -> None:
    block = PAGE.split("## Rooms")[1].split("Inside a service")[0]
    for path in re.findall(r"^    ((?:protos|services|deploy|tools|tests)[\w/]*)", block, re.M):
        assert (ROOT / path).is_dir(), path
    services = re.search(r"services/<service>\s+([\w, ]+)", block)
    assert services is not None
    for name in services[1].split(", "):
        assert (ROOT / "services" / name).is_dir(), name
    core = set(re.findall(r"`(\w+)`", PAGE.split("Core has the pieces")[1].split("For NATS and")[0]))
    there = {path.stem for path in (ROOT / "services/core").iterdir()}
    assert core and core <= there, core - there
