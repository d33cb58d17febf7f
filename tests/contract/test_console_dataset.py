"""The console's dataset: what a scan found, thresholds tried out, languages on and off, files and their verdicts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from codegraft.common.v1.job_pb2 import JobState, JobStatus, Progress
from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.project_pb2 import GetProjectResponse, Project
from codegraft.ingest.v1.snapshot_pb2 import CreateSnapshotResponse, ListSnapshotsResponse, Snapshot
from codegraft.scanner.v1 import scan_pb2 as pb
from codegraft.scanner.v1 import verdict_pb2
from services.core import errors
from services.gateway.console import histogram, scan_settings
from tests.contract.console_world import EVIL, Browser, Page, check, later

pytest_plugins = ["tests.contract.console_fixtures"]
HERE = "/console/p/acme/dataset"
SCAN = "projects/acme/scans/s-1"


def scan(state: Any = JobState.JOB_STATE_SUCCEEDED, **fields: Any) -> pb.Scan:
    report = pb.ScanReport(
        file_count=1000, accepted_count=600, rejected_count=400, warnings=[EVIL],
        train=pb.ScanCount(files=570, tokens=5_000_000), test=pb.ScanCount(files=30),
        reasons={
            "ACCEPTED": pb.ScanCount(files=600), "HIGH_LOSS": pb.ScanCount(files=50),
            "NOT_TEXT": pb.ScanCount(files=350),
        },
        all_languages={"Python": pb.ScanCount(files=700), EVIL: pb.ScanCount(files=200), "": pb.ScanCount(files=100)},
        languages={"Python": pb.ScanCount(files=500)},
        losses={"Python": pb.LanguageLoss(median=1.5, mad=0.25, threshold=3)},
        loss_bins=[
            pb.LossBin(low=1, high=1.5, accepted=400), pb.LossBin(low=2.5, high=3, accepted=200),
            pb.LossBin(low=3, high=4, rejected=50),
        ],
    )  # fmt: skip
    progress = Progress(done=5, total=10, unit="files", message=EVIL)
    status = JobStatus(state=state, worker=EVIL, progress=progress)
    snapshot = "projects/acme/snapshots/0123456789abcdef"
    return pb.Scan(**{"name": SCAN, "snapshot": snapshot, "status": status, "report": report, **fields})


@pytest.fixture
def acme(browser: Browser) -> Browser:
    """A project with a scan that ended."""
    project = Project(name="projects/acme", etag="9", languages_off=["SQL", EVIL])
    browser.services.scripts |= {
        "ListScans": [pb.ListScansResponse(scans=[scan(), scan(name="projects/acme/scans/s-0")])],
        "GetScan": [pb.GetScanResponse(scan=scan())],
        "GetProject": [GetProjectResponse(project=project)],
    }
    return browser


def test_a_threshold_above_all_losses_is_in_the_picture() -> None:
    found = histogram.of(scan(settings=pb.ScanSettings(max_loss=8)))
    assert found and (found.low, found.high, found.at) == (0, 8, 760)


async def test_the_page_shows_funnel_reasons_losses_and_languages(acme: Browser) -> None:
    page = await acme.page(HERE)
    wanted = {"scan-state", "funnel", "reasons", "histogram", "threshold", "languages", "choose-scan", "preview"}
    assert wanted <= set(page.ids) and "<script>alert" not in page.html and EVIL in page.text
    funnel = page.text[page.text.index("in the snapshot") : page.text.index("Reasons")]
    for number in ("1,000", "650", "600", "570", "30", "60.0 %"):
        assert number in funnel, number
    bars = [each for each in page.of("rect") if each["class"] == "accepted" and "x" in each]
    assert [float(each["height"]) for each in bars] == [200, 100, 0]
    assert [float(each["x"]) for each in bars] == [190, 475, 570], "0 to 4 nats on 760 units"
    line = next(each for each in page.of("line") if each.get("id") == "threshold-line")
    assert float(line["x1"]) == 760 * 3 / 4, "the scanner's default"
    boxes = {each["value"]: "checked" in each for each in page.of("input") if each.get("name") == "on"}
    assert boxes == {"Python": True, EVIL: False}
    live = next(each["data-live"] for each in page.of("div") if "data-live" in each)
    assert live == f"{HERE}/live?shown=s-1", "it has ended: only the list goes on"
    acme.services.scripts["ListScans"] = [pb.ListScansResponse()]
    assert "no-scans" in (await acme.page(HERE)).ids


async def test_languages_that_are_not_checked_are_off_and_others_stay(acme: Browser) -> None:
    await acme.send(f"{HERE}/languages", etag="8", shown=["Python", "Go"], on=["Go"])
    sent = acme.asked("UpdateProject").project
    assert (sent.etag, list(sent.languages_off)) == ("8", sorted(["Python", "SQL", EVIL]))


async def test_a_threshold_is_tried_out_exactly_and_then_taken(acme: Browser) -> None:
    def verdicts(request: pb.ListVerdictsRequest) -> pb.ListVerdictsResponse:
        leaving = request.filter.accepted
        found = [verdict_pb2.Verdict(path=EVIL)] if leaving else []
        return pb.ListVerdictsResponse(verdicts=found, total_count=7 if leaving else 3)

    acme.services.scripts["ListVerdicts"] = [verdicts]
    found = (await acme.http.get(f"{HERE}/preview?scan=s-1&threshold=2.5")).json()
    assert found == {"leaving": 7, "coming": 3, "leaving_paths": [EVIL], "coming_paths": []}
    by_side = {request.filter.accepted: request.filter for request in acme.services.requests["ListVerdicts"]}
    assert by_side[True].min_loss == math.nextafter(2.5, 3) and by_side[False].max_loss == 2.5
    assert list(by_side[False].reasons) == [verdict_pb2.VERDICT_REASON_HIGH_LOSS]
    for query in ("scan=s-1", "scan=s-1&threshold=x", "threshold=1", "scan=../x&threshold=1"):
        answer = await acme.http.get(f"{HERE}/preview?{query}", headers={"accept": "application/json"})
        assert answer.status_code == 400, query
    settings = pb.ScanSettings(exclude=["a"], loss_mad=3)
    acme.services.scripts["GetScan"] = [pb.GetScanResponse(scan=scan(settings=settings))]
    acme.services.scripts["CreateScan"] = [pb.CreateScanResponse(scan=scan(name="projects/acme/scans/s-2"))]
    answer = await acme.send(HERE, again="s-1", threshold="2.5")
    assert answer.headers["location"] == f"{HERE}?scan=s-2"
    sent = acme.asked("CreateScan")
    assert sent.settings == pb.ScanSettings(exclude=["a"], max_loss=2.5) and sent.snapshot == scan().snapshot


async def test_a_scan_starts_with_what_was_asked_for_and_is_cancelled(acme: Browser) -> None:
    snapshot = Snapshot(name="projects/acme/snapshots/new", file_count=3)
    acme.services.scripts |= {
        "CreateScan": [pb.CreateScanResponse(scan=scan())],
        "CancelScan": [pb.CancelScanResponse(scan=scan())],
        "ListSnapshots": [ListSnapshotsResponse(snapshots=[snapshot])],
        "CreateSnapshot": [CreateSnapshotResponse(snapshot=snapshot)],
    }
    assert {each.name for each in scan_settings.SETTINGS} == set(pb.ScanSettings.DESCRIPTOR.fields_by_name)
    page = await acme.page(f"{HERE}/new")
    assert {each.name for each in scan_settings.SETTINGS} | {"snapshot", "start"} <= set(page.ids)
    written = {"whole": "2", "number": "0.5", "switch": "off", "choice": "SECRET_POLICY_REDACT"}
    every = {each.name: written.get(each.kind, "a\r\nb") for each in scan_settings.SETTINGS}
    await acme.send(HERE, snapshot="abc", **every)
    sent = acme.asked("CreateScan")
    assert len(sent.settings.ListFields()) == len(scan_settings.SETTINGS) and list(sent.settings.exclude) == ["a", "b"]
    assert sent.snapshot == "projects/acme/snapshots/abc" and "CreateSnapshot" not in acme.services.requests
    assert sent.settings.secrets == pb.SECRET_POLICY_REDACT and sent.settings.reject_vendored is False
    await acme.send(HERE)
    assert acme.asked("CreateScan").snapshot == snapshot.name and not acme.asked("CreateScan").settings.ListFields()
    for field, bad in (("min_tokens", "x"), ("min_tokens", "9" * 20), ("max_loss", "x"), ("secrets", "SHOUT")):
        assert (await acme.send(HERE, **{field: bad})).status_code == 400, (field, bad)
    await acme.send(f"{HERE}/cancel", scan="s-1")
    assert acme.asked("CancelScan").name == SCAN
    acme.services.scripts["CreateSnapshot"] = [errors.NoSources("acme has no source", hint="Add one.")]
    answer = await acme.send(HERE)
    assert answer.status_code == 400 and "acme has no source" in check(answer.text).text


async def test_a_running_scan_is_live_to_its_report(acme: Browser) -> None:
    running = scan(JobState.JOB_STATE_RUNNING, report=pb.ScanReport())
    acme.services.scripts["GetScan"] = [pb.GetScanResponse(scan=running)]
    page = await acme.page(f"{HERE}?scan=s-1")
    live = next(each["data-live"] for each in page.of("div") if "data-live" in each)
    assert "scan-progress" in page.ids and "5 of 10 files" in page.text
    changes = [pb.WatchScansResponse(scan=each) for each in (running, scan())]
    acme.services.scripts["WatchScans"] = [changes]
    events = await acme.listen(live)
    assert [kind for kind, _, _ in events] == ["part", "part", "part", "end"]
    kinds = [Page(html).elements[0][1]["id"] for _, html, _ in events[:3]]
    assert kinds == ["choose-scan", "scan-state", "scan-report"]
    assert "cancel-scan" not in Page(events[1][1]).ids and "<script>alert" not in events[2][1]
    assert (await acme.http.get(f"{HERE}/live?shown=a/b")).status_code == 400


async def test_scans_of_others_can_be_chosen_as_they_come(acme: Browser) -> None:
    acme.services.scripts["ListScans"] = [pb.ListScansResponse(scans=[scan()])]
    page = await acme.page(HERE)
    assert "hidden" in next(each for each in page.of("form") if each.get("id") == "choose-scan"), "nothing to choose"
    other = scan(name="projects/acme/scans/s-2")
    other.status.create_time.seconds = 2_000_000_000
    removed = pb.WatchScansResponse(removed="projects/acme/scans/s-2")
    acme.services.scripts["WatchScans"] = [[pb.WatchScansResponse(scan=other), later(removed, acme, 1)]]
    events = await acme.listen(f"{HERE}/live?shown=s-1")
    assert [kind for kind, _, _ in events] == ["part", "part", "end"]
    two, one = (Page(html) for _, html, _ in events[:2])
    assert [(each["value"], "selected" in each) for each in two.of("option")] == [("s-2", False), ("s-1", True)]
    assert "hidden" not in two.of("form")[0] and "hidden" in one.of("form")[0]
    acme.services.scripts["ListScans"] = [pb.ListScansResponse()]
    assert (await acme.listen(f"{HERE}/live?shown="))[0][0] == "end", "the page says that there is none: loaded anew"


async def test_files_are_listed_page_by_page_as_filtered(acme: Browser) -> None:
    accepted = verdict_pb2.Verdict(path="a/ü b.py", source="projects/acme/sources/app", accepted=True, loss=1.5, size=9)
    accepted.split = Split.SPLIT_TRAIN
    hostile = verdict_pb2.Verdict(
        path=f"x/{EVIL}", source="projects/acme/sources/app", reason=verdict_pb2.VERDICT_REASON_SECRET, detail=EVIL
    )
    found = pb.ListVerdictsResponse(verdicts=[accepted, hostile], total_count=1234, next_page_token="t&t")
    acme.services.scripts["ListVerdicts"] = [found]
    query = "scan=s-1&which=rejected&reason=HIGH_LOSS&language=C%23&path=*.cs&min_loss=1&max_loss=2.5"
    page = await acme.page(f"{HERE}/files?{query}")
    sent = acme.asked("ListVerdicts")
    assert (sent.parent, sent.page_size, sent.page_token) == (SCAN, 100, "")
    assert sent.filter == verdict_pb2.VerdictFilter(
        accepted=False,
        reasons=[verdict_pb2.VERDICT_REASON_HIGH_LOSS],
        languages=["C#"],
        path="*.cs",
        min_loss=1,
        max_loss=2.5,
    )
    assert "1,234 files" in page.text and "<script>alert" not in page.html and EVIL in page.text
    following = next(each["href"] for each in page.of("a") if each.get("id") == "next-page")
    page = await acme.page(f"{HERE}/files{following}")
    sent = acme.asked("ListVerdicts")
    assert sent.page_token == "t&t" and list(sent.filter.languages) == ["C#"] and "first-page" in page.ids
    links = [each["href"] for each in page.of("a") if "/file?" in each["href"]]
    acme.services.scripts["ListVerdicts"] = [pb.ListVerdictsResponse(verdicts=[hostile])]
    await acme.page(links[1])
    assert acme.asked("ListVerdicts").filter.path.startswith("/x/<script>alert(1)<\\/script>".replace("\\/", "/"))
    for bad in ("which=all", "reason=LUCK", "min_loss=x", "scan=a/b"):
        assert (
            await acme.http.get(f"{HERE}/files?scan=s-1&{bad}" if "scan" not in bad else f"{HERE}/files?{bad}")
        ).status_code == 400


async def test_one_files_verdict_is_explained(acme: Browser) -> None:
    path = "a [1]/*.py"
    verdict = verdict_pb2.Verdict(
        path=path, source="projects/acme/sources/app", stage=2, language="Python", loss=3.75, bits_per_byte=1.25,
        tokens=5000, sampled_tokens=4096, reason=verdict_pb2.VERDICT_REASON_HIGH_LOSS,
        reasons=[verdict_pb2.VERDICT_REASON_HIGH_LOSS, verdict_pb2.VERDICT_REASON_DUPLICATE], details=[EVIL],
        duplicate_of=EVIL, similarity=0.9, license="MIT",
    )  # fmt: skip
    other = verdict_pb2.Verdict(path=path, source="projects/acme/sources/lib")
    acme.services.scripts["ListVerdicts"] = [pb.ListVerdictsResponse(verdicts=[other, verdict])]
    page = await acme.page(f"{HERE}/file?scan=s-1&source=app&path=a%20%5B1%5D%2F*.py")
    assert acme.asked("ListVerdicts").filter.path == "/a\\ \\[1]/\\*.py"
    for words in (
        "rejected in stage 2",
        "HIGH_LOSS",
        "DUPLICATE",
        "3.7500 nats",
        "1.250 bits",
        "median 1.5000",
        "5,000",
    ):
        assert words in page.text, words
    assert "<script>alert" not in page.html and EVIL in page.text and "90.0 % alike" in page.text
    page = await acme.page(f"{HERE}/file?scan=s-1&source=other&path=x", 404)
    assert "VERDICT_NOT_FOUND" in page.text
