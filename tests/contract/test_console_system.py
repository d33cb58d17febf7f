"""The console's system page: health, jobs, keys whose secret is shown once, the audit log."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from codegraft.access.v1 import access_pb2 as pb
from codegraft.access.v1.audit_pb2 import AuditChange, AuditRecord, ListAuditRecordsResponse
from codegraft.access.v1.worker_pb2 import ListWorkersResponse, Worker
from codegraft.common.v1.job_pb2 import JobState, JobStatus, Progress
from codegraft.inference.v1.serving_pb2 import Adapter, ListAdaptersResponse
from codegraft.ingest.v1.project_pb2 import ListProjectsResponse, Project
from codegraft.scanner.v1.scan_pb2 import ListScansResponse, Scan, WatchScanResponse
from codegraft.trainer.v1.run_pb2 import ListRunsResponse, Run, WatchRunResponse
from services.client import retry
from services.core import errors
from services.core.backoff import Backoff
from services.gateway.console import auditing, jobs
from tests.contract.console_world import EVIL, Browser, Page, check

pytest_plugins = ["tests.contract.console_fixtures"]
HERE = "/console/system"
SECRET = "cg_ci_s3cr3t"
SAME = "projects/acme/runs/r-1/checkpoints"


@pytest.fixture
def acme(browser: Browser) -> Browser:
    """A system with a project, jobs and keys."""
    statuses: list[Any] = [JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_RUNNING, JobState.JOB_STATE_SUCCEEDED]
    keys = [
        pb.Key(name="keys/ci", title=EVIL, role=pb.ROLE_CONTRIBUTOR, projects=["projects/acme"], creator=EVIL),
        pb.Key(name="keys/old", role=pb.ROLE_READER, all_projects=True),
    ]
    keys[1].revoke_time.GetCurrentTime()
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    browser.services.scripts |= {
        "Check": [serving],
        "ListProjects": [ListProjectsResponse(projects=[Project(name="projects/acme")])],
        "ListScans": [
            ListScansResponse(scans=[Scan(name="projects/acme/scans/s-1", status=JobStatus(state=statuses[0]))])
        ],
        "ListRuns": [
            ListRunsResponse(
                runs=[
                    Run(name=f"projects/acme/runs/r-{number}", status=JobStatus(state=state, worker=EVIL, attempt=2))
                    for number, state in enumerate(statuses[1:])
                ]
            )
        ],
        "ListKeys": [pb.ListKeysResponse(keys=keys)],
        "ListWorkers": [
            ListWorkersResponse(workers=[Worker(name="workers/host-1-0", kind="scan")]),
            ListWorkersResponse(workers=[Worker(name="workers/host-2-0", kind=EVIL, job="projects/acme/runs/r-0")]),
        ],
        "ListAdapters": [
            ListAdaptersResponse(
                adapters=[
                    Adapter(checkpoint=EVIL, lora_r=16, projects=["projects/acme"]),
                    Adapter(checkpoint=f"{SAME}/1", checkpoints=[f"{SAME}/1", f"{SAME}/2"]),
                ]
            )
        ],
        "CreateKey": [pb.CreateKeyResponse(key=keys[0], secret=SECRET)],
        "RotateKey": [pb.RotateKeyResponse(key=keys[0], secret=SECRET)],
    }
    return browser


async def test_the_page_tells_of_health_jobs_adapters_and_keys(acme: Browser) -> None:
    page = await acme.page(HERE)
    assert {f"health-{each}" for each in ("ingest", "scanner", "trainer", "inference")} <= set(page.ids)
    assert {"jobs", "adapters", "key-ci", "key-old", "rotate-ci", "create-key", "audit"} <= set(page.ids)
    assert "rotate-old" not in page.ids and "<script>alert" not in page.html and EVIL in page.text
    jobs = page.text[page.text.index("Queues") : page.text.index("Adapters in")]
    assert jobs.index("acme/runs/r-0") < jobs.index("acme/scans/s-1") and "r-1" not in jobs, (
        "what runs, then what waits"
    )
    assert f"{SAME}/1 {SAME}/2 0" in page.text, "all names of the same weights"
    assert "host-1-0 scans idle -" in page.text and f"host-2-0 {EVIL}s working acme/runs/r-0" in page.text
    denied = errors.PermissionDenied("too low a role")
    acme.services.scripts |= {
        "ListKeys": [denied],
        "ListAdapters": [denied],
        "ListAuditRecords": [denied],
        "ListWorkers": [denied],
    }
    acme.services.scripts["Check"] = [errors.Unavailable("away")]
    page = await acme.page(HERE)
    assert {"keys-denied", "adapters-denied", "workers-denied"} <= set(page.ids) and "unreachable" in page.text
    await acme.page(f"{HERE}/audit", 403)


async def test_the_page_is_there_while_services_are_not(acme: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", Backoff(timedelta(milliseconds=2), timedelta(milliseconds=4)))
    for method in ("Check", "ListRuns", "ListAdapters"):
        acme.services.scripts[method] = [errors.Unavailable("away")]
    page = await acme.page(HERE)
    assert {"jobs-unknown", "adapters-denied", "key-ci"} <= set(page.ids) and "unreachable" in page.text
    for method in ("GetCaller", "ListProjects", "ListKeys"):
        acme.services.scripts[method] = [errors.Unavailable("away")]
    assert {"health", "keys-denied"} <= set((await acme.page(HERE)).ids)


async def test_a_defect_of_ours_is_a_page_with_the_way_to_its_log(
    acme: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "newest", None)
    page = await acme.page(f"{HERE}/audit", 500)
    answer = await acme.http.get(f"{HERE}/audit", headers={"x-request-id": "r-42"})
    assert "INTERNAL" in page.text and "request id r-42 in the logs" in answer.text and "NoneType" not in answer.text


async def test_live_streams_do_not_hold_the_gateway_up_at_its_end(acme: Browser) -> None:
    async with acme.http.stream("GET", f"{HERE}/live", headers={"accept": "text/event-stream"}) as answer:
        lines = answer.aiter_lines()
        while await anext(lines) != "event: part":
            pass
        began = time.monotonic()
        acme.leave()
        rest = [line async for line in lines]
    assert time.monotonic() - began < 8 and "event: end" not in rest, "browsers come back, to the next one"


async def test_health_is_live(acme: Browser) -> None:
    events = await acme.listen(f"{HERE}/live", until='id="health"')
    part = Page(events[-1][1])
    assert part.ids[0] == "health" and part.text.count("serving") == 4


async def test_workers_are_live_the_idle_ones_too(acme: Browser) -> None:
    (_, html, _) = (await acme.listen(f"{HERE}/live", until='id="all-workers"'))[-1]
    assert "host-1-0 scans idle -" in Page(html[html.index('<div id="all-workers"') :]).text
    acme.services.scripts["ListWorkers"] = [ListWorkersResponse()]
    assert "no-workers" in (await acme.page(HERE)).ids


async def test_jobs_are_followed_to_their_end_and_new_ones_found(
    acme: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_RELIST", 2.0)  # what is watched comes well before
    run, scan = "projects/acme/runs/r-0", "projects/acme/scans/s-1"
    ended = Run(name=run, status=JobStatus(state=JobState.JOB_STATE_SUCCEEDED))
    far = JobStatus(state=JobState.JOB_STATE_RUNNING, progress=Progress(done=3, total=9, unit="files"))
    acme.services.scripts |= {
        "ListScans": [*acme.services.scripts["ListScans"], ListScansResponse()],
        "WatchRun": [[WatchRunResponse(run=ended)]],
        "WatchScan": [[WatchScanResponse(scan=Scan(name=scan, status=far))]],
    }
    events = await acme.listen(f"{HERE}/live", until=lambda html: 'id="all-jobs"' in html and "s-1" not in html)
    listed, *_, followed, anew = [Page(html) for _, html, _ in events if 'id="all-jobs"' in html]
    assert "queued" in listed.text and "3 of 9 files" not in listed.text
    assert "3 of 9 files" in followed.text and "succeeded" in followed.text, "of both at once, or of one after another"
    assert "r-0" in anew.text, "looked for anew"


async def test_a_secret_is_in_one_answer_only(acme: Browser) -> None:
    page = await acme.page(HERE)
    request_id = next(each["value"] for each in page.of("input") if each.get("name") == "request_id")
    fields = {"key_id": "ci", "role": "contributor", "projects": ["acme"], "days": "90", "request_id": request_id}
    answer = await acme.send(f"{HERE}/keys", **fields)
    assert answer.status_code == 200 and SECRET in check(answer.text).text
    assert answer.headers["cache-control"] == "no-store" and SECRET not in (await acme.http.get(HERE)).text
    sent = acme.asked("CreateKey")
    assert (sent.key_id, list(sent.key.projects), sent.request_id) == ("ci", ["projects/acme"], request_id)
    assert sent.key.role == pb.ROLE_CONTRIBUTOR and not sent.key.all_projects and sent.key.HasField("expire_time")
    answer = await acme.send(f"{HERE}/keys/ci/rotate", overlap_hours="2")
    assert SECRET in check(answer.text).text and acme.asked("RotateKey").overlap.seconds == 7200
    assert (await acme.send(f"{HERE}/keys/ci/revoke")).headers["location"] == f"{HERE}#keys"
    assert acme.asked("RevokeKey").name == "keys/ci"
    for bad in ({"role": "god"}, {"role": "reader", "days": "-1"}, {"role": "reader", "days": "nan"}):
        assert (await acme.send(f"{HERE}/keys", **bad)).status_code == 400, bad
    assert (await acme.send(f"{HERE}/keys/ci/rotate", overlap_hours="inf")).status_code == 400
    assert acme.services.count("CreateKey") == 1


async def test_the_audit_log_tells_who_changed_what_the_newest_first(acme: Browser) -> None:
    change = AuditChange(name="projects/acme")
    change.before.update({"title": "old", "same": 1})
    change.after.update({"title": EVIL, "same": 1})
    records = [
        AuditRecord(method="/codegraft.ingest.v1.ProjectService/CreateProject", caller=EVIL, code="OK"),
        AuditRecord(
            method="/x/UpdateProject", caller="keys/ci", changes=[change], reason="ETAG_MISMATCH", code="ABORTED"
        ),
    ]
    acme.services.scripts["ListAuditRecords"] = [ListAuditRecordsResponse(records=records)]
    page = await acme.page(f"{HERE}/audit?project=acme&days=30")
    assert page.text.index("UpdateProject") < page.text.index("CreateProject") and "<script>alert" not in page.html
    assert f"title: old -> {EVIL}" in page.text and "same" not in page.text and "ETAG_MISMATCH" in page.text
    assert acme.asked("ListAuditRecords").parent == "projects/acme"
    acme.services.scripts["ListAuditRecords"] = [ListAuditRecordsResponse()]
    assert "no-records" in (await acme.page(f"{HERE}/audit")).ids
    assert acme.asked("ListAuditRecords").parent == "projects/-"
