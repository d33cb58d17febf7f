"""The console's serving page: what answers and where it came from, the choice, the playground, acceptance, swaps."""

from __future__ import annotations

import asyncio
import json

import pytest

from codegraft.access.v1.audit_pb2 import AuditChange, AuditRecord, ListAuditRecordsResponse
from codegraft.common.v1.job_pb2 import Failure
from codegraft.inference.v1 import completion_pb2, feedback_pb2
from codegraft.inference.v1 import serving_pb2 as pb
from codegraft.ingest.v1.snapshot_pb2 import GetSnapshotResponse, Snapshot, SnapshotSource
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetPart
from codegraft.scanner.v1.scan_pb2 import GetDatasetResponse
from codegraft.trainer.v1 import run_pb2
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from services.core import errors
from tests.contract.console_world import EVIL, Browser, Page, check, later

pytest_plugins = ["tests.contract.console_fixtures"]
HERE = "/console/p/acme/serving"
BEST = "projects/acme/runs/r-1/checkpoints/120"


@pytest.fixture
def acme(browser: Browser) -> Browser:
    """A project whose adapter serves, with names that do harm."""
    serving = pb.Serving(
        mode=pb.SERVING_MODE_PINNED, pinned_checkpoint=BEST, wanted_checkpoint=BEST, wanted_test_loss=1.2, etag="3",
        waiting_checkpoint="projects/acme/runs/r-2/checkpoints/7", waiting_test_loss=1.9,
        split=pb.Split(percent=10),
        history=[pb.ServedVersion(checkpoint=BEST, test_loss=1.2, mode=pb.SERVING_MODE_PINNED), pb.ServedVersion()],
    )  # fmt: skip
    failure = Failure(reason="ADAPTER_REJECTED", message=EVIL)
    status = pb.ServingStatus(
        active_checkpoint=BEST, active_sha256="ab", ready=True, converged=True, model=EVIL, replica=EVIL,
        failure=failure, streams={"ab": 3, "": 1}, last_swap_seconds=0.25,
    )  # fmt: skip
    counted = feedback_pb2.AdapterAcceptance(adapter_sha256="ab", checkpoint=BEST, shown=10, accepted=4, rate=0.4)
    change = AuditChange(name="projects/acme/serving")
    change.before.update({"mode": "SERVING_MODE_OFF"})
    change.after.update({"mode": EVIL})
    record = AuditRecord(method="/codegraft.inference.v1.ServingService/SetServing", caller=EVIL, changes=[change])
    other = AuditRecord(method="/codegraft.ingest.v1.SourceService/SyncSource", caller="keys/other")
    dataset = Dataset(
        name="projects/acme/datasets/d", snapshot="projects/acme/snapshots/s", train=DatasetPart(files=1234)
    )
    source = SnapshotSource(source="projects/acme/sources/app", origin=EVIL, commit="c0ffee" * 4)
    run = run_pb2.Run(name="projects/acme/runs/r-1", title=EVIL, dataset=dataset.name, best_checkpoint=BEST)
    browser.services.scripts |= {
        "GetServing": [pb.GetServingResponse(serving=serving, status=status)],
        "GetAcceptance": [
            feedback_pb2.GetAcceptanceResponse(adapters=[counted, feedback_pb2.AdapterAcceptance(shown=5)])
        ],
        "ListAuditRecords": [ListAuditRecordsResponse(records=[other, record])],
        "GetCheckpoint": [
            run_pb2.GetCheckpointResponse(checkpoint=Checkpoint(name=BEST, step=120, sha256="ab" * 32, test_loss=1.2))
        ],
        "GetRun": [run_pb2.GetRunResponse(run=run)],
        "ListRuns": [run_pb2.ListRunsResponse(runs=[run])],
        "GetDataset": [GetDatasetResponse(dataset=dataset)],
        "GetSnapshot": [GetSnapshotResponse(snapshot=Snapshot(name=dataset.snapshot, sources=[source]))],
    }
    return browser


async def test_the_page_tells_what_serves_and_where_it_came_from(acme: Browser) -> None:
    page = await acme.page(f"{HERE}?days=30")
    assert "<script>alert" not in page.html and EVIL in page.text
    wanted = {"serving-state", "approve", "policy", "lineage-run", "lineage-dataset", "lineage-commits", "history"}
    assert wanted | {"playground", "answer-base", "answer-adapter", "acceptance", "swaps"} <= set(page.ids)
    assert "1,234 train" in page.text and "c0ffeec0ffee" in page.text and "40.0 %" in page.text
    assert "r-1/120 1.2000 pinned" in page.text, "what served from when on"
    assert "base model (control)" in page.text and "keys/other" not in page.text
    assert acme.asked("GetAcceptance").window.seconds == 30 * 86400
    chosen = [each["id"] for each in page.of("input") if each.get("type") == "radio" and "checked" in each]
    assert chosen == ["mode-pinned"]
    acme.services.scripts["GetDataset"] = [errors.DatasetNotFound("gone")]
    acme.services.scripts["ListAuditRecords"] = [errors.PermissionDenied("no operator")]
    page = await acme.page(HERE)
    assert {"lineage-run", "lineage-gone", "history-denied"} <= set(page.ids) and "lineage-dataset" not in page.ids
    for method in ("GetCheckpoint", "ListRuns"):
        acme.services.scripts[method] = [errors.StateUnavailable("no NATS", retry_after=60)]
    page = await acme.page(HERE)
    assert {"set-policy", "lineage-away"} <= set(page.ids) and "no-lineage" not in page.ids, "the trainer is away"
    acme.services.scripts["GetServing"] = [pb.GetServingResponse()]
    assert {"no-lineage", "no-swaps", "mode-off"} <= set((await acme.page(HERE)).ids)


async def test_the_policy_is_set_as_chosen(acme: Browser) -> None:
    answer = await acme.send(HERE, mode="pinned", checkpoint="r-1", etag="3", split="base", percent="10")
    assert answer.headers["location"] == HERE
    assert acme.asked("GetCheckpoint").name == "projects/acme/runs/r-1/checkpoints/best"
    sent = acme.asked("SetServing")
    assert (sent.mode, sent.checkpoint, sent.etag) == (pb.SERVING_MODE_PINNED, BEST, "3")
    assert sent.split == pb.Split(percent=10)
    for word, mode in (("off", pb.SERVING_MODE_OFF), ("latest-best", pb.SERVING_MODE_LATEST_BEST)):
        await acme.send(HERE, mode=word, checkpoint="r-9/1")
        sent = acme.asked("SetServing")
        assert (sent.mode, sent.checkpoint) == (mode, "") and not sent.HasField("split")
    count = acme.services.count("SetServing")
    for bad in (
        {"mode": "best"},
        {"mode": "pinned"},
        {"mode": "pinned", "checkpoint": "../r/1"},
        {"mode": "off", "split": "base"},
        {"mode": "off", "percent": "5"},
        {"mode": "off", "split": "base", "percent": "100"},
    ):
        assert (await acme.send(HERE, **bad)).status_code == 400, bad
    assert acme.services.count("SetServing") == count
    await acme.send(f"{HERE}/approve", checkpoint=BEST, etag="3")
    assert acme.asked("ApproveServing").checkpoint == BEST
    acme.services.scripts["SetServing"] = [errors.PermissionDenied("only operators decide what serves")]
    answer = await acme.send(HERE, mode="off")
    assert answer.status_code == 403 and "only operators decide" in check(answer.text).text


async def test_swaps_are_told_as_they_happen(acme: Browser) -> None:
    def now(sha256: str, *checkpoints: str) -> pb.WatchServingResponse:
        status = pb.ServingStatus(active_sha256=sha256, ready=True, converged=True)
        serving = pb.Serving(history=[pb.ServedVersion(checkpoint=each) for each in checkpoints])
        status.active_checkpoint = checkpoints[0] if checkpoints else ""
        return pb.WatchServingResponse(serving=serving, status=status)

    swapped = now("cd", BEST, "projects/acme/runs/r-0/checkpoints/9")
    acme.services.scripts["WatchServing"] = [[now("ab"), now("ab"), later(swapped, acme, 3)]]
    events = await acme.listen(f"{HERE}/live")
    parts = [Page(data).ids[0] for kind, data, _ in events if kind == "part"]
    assert parts == ["serving-state", "swap-history", "came-from"] * 2
    assert events[-1][0] == "end" and "no-swaps" in events[1][1] and "no-lineage" in events[2][1]
    assert "serving" in Page(events[3][1]).text
    swaps = Page(events[4][1]).text
    assert swaps.index("r-1/120") < swaps.index("r-0/9")
    assert "c0ffeec0ffee" in events[5][1]
    acme.services.scripts["WatchServing"] = [[now("cd", BEST)]]
    again = await acme.listen(f"{HERE}/live")
    assert "c0ffeec0ffee" in again[2][1], "a swap while the connection was lost"


async def test_base_and_adapter_complete_beside_each_other_as_text_is_made(acme: Browser) -> None:
    text = "a\u2028\n" + EVIL
    pieces = [
        completion_pb2.CompleteResponse(started=completion_pb2.Started(model="m", checkpoint=BEST, prompt_tokens=5)),
        completion_pb2.CompleteResponse(delta=completion_pb2.Delta(text=text)),
        completion_pb2.CompleteResponse(finished=completion_pb2.Finished(reason=completion_pb2.FINISH_REASON_STOP)),
    ]
    acme.services.scripts["Complete"] = [pieces]  # type: ignore[list-item]
    await acme.page("/console")
    headers = {"accept": "text/event-stream", "x-csrf-token": acme.csrf}
    fields = {"prefix": " def f():\r\n    ", "suffix": "", "path": "a.py", "max_tokens": "9", "temperature": "0.5"}
    for version, adapter in (
        ("base", completion_pb2.AdapterChoice(base=True)),
        ("r-1/120", completion_pb2.AdapterChoice(checkpoint=BEST)),
        ("r-1", completion_pb2.AdapterChoice(checkpoint=BEST)),
        ("policy", completion_pb2.AdapterChoice()),
    ):
        answer = await acme.http.post(f"{HERE}/playground", data={**fields, "version": version}, headers=headers)
        kinds = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
        assert kinds == ["started", "text", "finished"] and answer.headers["content-type"].startswith("text/event-")
        said = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        assert json.loads(said[0])["checkpoint"] == "r-1/120" and json.loads(said[1]) == text
        sent = acme.asked("Complete")
        assert sent.adapter == adapter and sent.prompt.prefix == " def f():\n    " and sent.stop.max_tokens == 9
        assert sent.sampling.temperature == 0.5
    acme.services.scripts["Complete"] = [errors.QueueFull("come back later")]
    answer = await acme.http.post(f"{HERE}/playground", data={"prefix": "x"}, headers=headers)
    assert "event: failed\ndata: come back later" in answer.text
    for bad in ({"max_tokens": "513"}, {"temperature": "hot"}, {"version": "../x"}):
        answer = await acme.http.post(f"{HERE}/playground", data={"prefix": "x", **bad}, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["code"].startswith("INVALID")
    assert (await acme.http.post(f"{HERE}/playground", data={"prefix": "x"})).status_code == 403


async def test_a_browser_that_goes_away_ends_the_generation(acme: Browser) -> None:
    async def never(request: object) -> None:
        await asyncio.sleep(60)

    started = completion_pb2.CompleteResponse(started=completion_pb2.Started(model="m"))
    acme.services.scripts["Complete"] = [[started, never]]  # type: ignore[list-item]
    await acme.page("/console")
    headers = {"accept": "text/event-stream", "x-csrf-token": acme.csrf}
    async with acme.http.stream("POST", f"{HERE}/playground", data={"prefix": "x"}, headers=headers) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: started"):
                break
    await asyncio.wait_for(acme.services.cancelled.wait(), 20)
