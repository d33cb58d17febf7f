"""The console's training: plan and start with every setting, a run's story live and taken up again, checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import Any

import httpx2
import pytest

from codegraft.common.v1.artifact_pb2 import ArtifactFile, FileChunk
from codegraft.common.v1.job_pb2 import Failure, JobState, JobStatus, Progress
from codegraft.trainer.v1 import run_pb2 as pb
from codegraft.trainer.v1.adapter_pb2 import ADAPTER_FORMAT_GGUF, DownloadCheckpointResponse, DownloadHeader
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan, PlannedSetting
from codegraft.trainer.v1.run_event_pb2 import EvalMetrics, Proof, ProofFigures, RunEvent, StepMetrics
from services.core import errors
from services.gateway.console.hyperparameters import SETTINGS
from services.trainer.planning.settings import RANGES
from tests.contract.console_world import EVIL, Browser, Page, check, later

pytest_plugins = ["tests.contract.console_fixtures"]
HERE = "/console/p/acme/training"
RUN = "projects/acme/runs/r-1"


def running(name: str = RUN, **fields: Any) -> pb.Run:
    progress = Progress(done=30, total=200, unit="steps", message=EVIL, eta_seconds=120, rate=1.5)
    status = JobStatus(state=JobState.JOB_STATE_RUNNING, progress=progress, worker=EVIL)
    return pb.Run(**{"name": name, "title": EVIL, "dataset": "projects/acme/datasets/d", "status": status, **fields})


def script(browser: Browser, *runs: pb.Run) -> None:
    browser.services.scripts["ListRuns"] = [pb.ListRunsResponse(runs=runs)]
    browser.services.scripts["GetRun"] = [pb.GetRunResponse(run=run) for run in runs]


def test_every_setting_is_there_with_the_trainers_range() -> None:
    assert {each.name for each in SETTINGS} == set(Hyperparameters.DESCRIPTOR.fields_by_name)
    told = {each.name: each.range for each in SETTINGS}
    for name, (low, high) in RANGES.items():
        numbers = [float(part) for part in told[name].split(" to ")]
        assert numbers == [low, float(high)], name


async def test_runs_and_one_of_them_whatever_they_are_called(browser: Browser) -> None:
    best = f"{RUN}/checkpoints/120"
    proof = Proof(verdict=EVIL, base=ProofFigures(test_loss=1.5), adapter=ProofFigures(test_loss=1.2), test_loss_p=0.01)
    plan = Plan(settings=[PlannedSetting(name="lora_r", value=EVIL, why=EVIL)])
    run = running(base_test_loss=1.5, best_test_loss=1.2, best_checkpoint=best, plan=plan, proof=proof)
    script(browser, run, running("projects/acme/runs/r-2"))
    browser.services.scripts["GetRun"] = [pb.GetRunResponse(run=run)]
    checkpoint = Checkpoint(name=best, step=120, sha256="ab" * 32, size=9 << 20, best=True, test_loss=1.2, strength=0.5)
    browser.services.scripts["ListCheckpoints"] = [pb.ListCheckpointsResponse(checkpoints=[checkpoint])]
    page = await browser.page(HERE)
    assert {"runs", "run-r-1", "run-r-2", "compare-button", "new-run"} <= set(page.ids) and EVIL in page.text
    page = await browser.page(f"{HERE}/r-1")
    wanted = {
        "curves",
        "log",
        "pause",
        "cancel",
        "run-progress",
        "download-120",
        "serve-120",
        "keep-120",
        "proof-verdict",
    }
    assert wanted <= set(page.ids) and "resume" not in page.ids and "<script>alert" not in page.html
    assert (
        "30 of 200 steps, 1.5 steps/s, 2 min 00 s left" in page.text
        and "9.0 MiB" in page.text
        and "1.2000" in page.text
    )
    assert "1.5000" in page.text and "at 50.0 %" in page.text and "0.0100" in page.text
    assert "-20.0 %" in page.text, "what the proof says has changed"


async def test_the_plan_of_what_was_filled_in_with_reasons(browser: Browser) -> None:
    plan = Plan(train_tokens=1234567, estimated_seconds=7200, settings=[
        PlannedSetting(name="lora_r", value="32", given=True), PlannedSetting(name="batch_size", value="8", why=EVIL),
    ])  # fmt: skip
    browser.services.scripts["PlanRun"] = [pb.PlanRunResponse(plan=plan)]
    page = await browser.page(f"{HERE}/new?initial=r-1")
    assert {each.name for each in SETTINGS} <= set(page.ids) and "2 h 00 min" in page.text
    assert next(each for each in page.of("input") if each.get("id") == "initial")["value"] == "r-1"
    answer = await browser.send(f"{HERE}/plan", lora_r="32", learning_rate="1e-4", low_gpu_memory_mode="off")
    page = check(answer.text)
    values = {each["id"]: each for each in page.of("input") if "id" in each}
    assert values["lora_r"]["value"] == "32" and values["batch_size"]["placeholder"] == "AUTO: 8" and EVIL in page.text
    asked = browser.asked("PlanRun").hyperparameters
    assert asked == Hyperparameters(lora_r=32, learning_rate=1e-4, low_gpu_memory_mode=False)
    browser.services.scripts["PlanRun"] = [errors.NoDataset("acme has no dataset", hint="Scan first.")]
    page = await browser.page(f"{HERE}/new")
    assert "acme has no dataset. Scan first." in page.text and "start" in page.ids, "one can still look at the form"


async def test_a_run_starts_with_what_was_asked_for_and_nothing_else(browser: Browser) -> None:
    browser.services.scripts["CreateRun"] = [pb.CreateRunResponse(run=running())]
    every = {
        each.name: {"whole": "2", "number": "0.5", "switch": "on", "names": "q_proj, v_proj"}[each.kind]
        for each in SETTINGS
    }
    answer = await browser.send(HERE, title="t", dataset="d", base_model="m", initial="r-0/7", **every)
    assert answer.headers["location"] == f"{HERE}/r-1"
    sent = browser.asked("CreateRun")
    assert len(sent.hyperparameters.ListFields()) == len(SETTINGS)
    assert list(sent.hyperparameters.target_modules) == ["q_proj", "v_proj"] and sent.hyperparameters.seed == 2
    assert (sent.dataset, sent.initial_checkpoint) == (
        "projects/acme/datasets/d",
        "projects/acme/runs/r-0/checkpoints/7",
    )
    await browser.send(HERE, initial="r-0")
    assert browser.asked("CreateRun").initial_checkpoint.endswith("/best")
    assert not browser.asked("CreateRun").hyperparameters.ListFields(), "empty is AUTO"
    for bad in (
        {"lora_r": "many"},
        {"lora_r": "9" * 30},
        {"learning_rate": "x"},
        {"dataset": "a/b"},
        {"initial": "../x"},
    ):
        answer = await browser.send(HERE, **bad)
        assert answer.status_code == 400, bad
    browser.services.scripts["CreateRun"] = [errors.InvalidHyperparameter("rank", field="hyperparameters.lora_r")]
    answer = await browser.http.post(HERE, data={"csrf": browser.csrf}, headers={"accept": "application/json"})
    assert answer.json()["error"]["param"] == "hyperparameters.lora_r"


async def test_pause_resume_cancel_and_keep(browser: Browser) -> None:
    for action, method in (("pause", "PauseRun"), ("resume", "ResumeRun"), ("cancel", "CancelRun")):
        answer = await browser.send(f"{HERE}/r-1/do/{action}")
        assert answer.status_code == 303 and browser.asked(method).name == RUN
    assert (await browser.send(f"{HERE}/r-1/do/delete")).status_code == 400
    await browser.send(f"{HERE}/r-1/checkpoints/120/keep", kept="on")
    assert browser.asked("KeepCheckpoint").name == f"{RUN}/checkpoints/120" and browser.asked("KeepCheckpoint").kept
    failed = JobStatus(
        state=JobState.JOB_STATE_FAILED, failure=Failure(reason="OUT_OF_MEMORY", message=EVIL, hint="Less.")
    )
    script(browser, running(status=failed))
    page = await browser.page(f"{HERE}/r-1")
    assert "OUT_OF_MEMORY" in page.text and not {"pause", "resume", "cancel"} & set(page.ids)


def story(first: int, last: int) -> list[Any]:
    told = [
        RunEvent(evaluation=EvalMetrics(step=0, test_loss=1.5)),
        RunEvent(step=StepMetrics(step=1, train_loss=1.6, tokens_per_second=900)),
        RunEvent(note=EVIL),
        RunEvent(evaluation=EvalMetrics(step=2, test_loss=1.2)),
        RunEvent(checkpoint=Checkpoint(name=f"{RUN}/checkpoints/2", step=2)),
        RunEvent(best=Checkpoint(step=2, test_loss=1.2)),
    ]
    for sequence, event in enumerate(told, 1):
        event.sequence = sequence
    done = running(status=JobStatus(state=JobState.JOB_STATE_SUCCEEDED))
    return [pb.WatchRunResponse(run=done, event=event) for event in told[first - 1 : last]]


async def test_a_runs_story_comes_as_points_and_goes_on_where_the_browser_has_it(browser: Browser) -> None:
    browser.services.scripts["WatchRun"] = [story(1, 4)]
    events = await browser.listen(f"{HERE}/r-1/live")
    assert [kind for kind, _, _ in events] == ["points", "part", "end"]
    points = json.loads(events[0][1])
    assert (points["train"], points["test"], points["speed"]) == ([[1, 1.6]], [[0, 1.5], [2, 1.2]], 900)
    assert points["lines"][1][1] == EVIL, "scripts put it in as text"
    assert events[0][2] == "4" and Page(events[1][1]).ids[0] == "run-state" and "<script>alert" not in events[1][1]
    assert browser.asked("WatchRun").after_sequence == 0
    browser.services.scripts["WatchRun"] = [story(5, 6)]
    events = await browser.listen(f"{HERE}/r-1/live", last="4")
    assert browser.asked("WatchRun").after_sequence == 4, "resumed"
    assert [kind for kind, _, _ in events] == ["points", "part", "part", "end"] and events[0][2] == "6"
    assert json.loads(events[0][1])["best"] == [[2, 1.2]] and Page(events[2][1]).ids[0] == "checkpoints"
    await browser.listen(f"{HERE}/r-1/live?after=4")
    assert browser.asked("WatchRun").after_sequence == 4, "a tab that is looked at again"
    await browser.listen(f"{HERE}/r-1/live?after=4", last="5")
    assert browser.asked("WatchRun").after_sequence == 5, "an outage after that"
    for nonsense in ("x", "-1", "9" * 40):
        await browser.listen(f"{HERE}/r-1/live", last=nonsense)
        assert browser.asked("WatchRun").after_sequence == 0


async def test_the_list_goes_on_with_everybodys_runs(browser: Browser) -> None:
    def begun(name: str, second: int, **fields: Any) -> pb.Run:
        run = running(f"projects/acme/runs/{name}", **fields)
        run.status.create_time.seconds = second
        return run

    script(browser)
    page = await browser.page(HERE)
    assert "no-runs" in page.ids and any(each.get("data-live") == f"{HERE}/live" for each in page.of("div"))
    script(browser, begun("r-2", 20, status=JobStatus(state=JobState.JOB_STATE_SUCCEEDED)), begun("r-1", 10))
    changes = [
        pb.WatchRunsResponse(run=begun("r-1", 10, status=JobStatus(state=JobState.JOB_STATE_FAILED))),
        pb.WatchRunsResponse(run=begun("r-3", 30)),
        pb.WatchRunsResponse(removed="projects/acme/runs/r-2"),
    ]
    browser.services.scripts["WatchRuns"] = [[*changes[:2], later(changes[2], browser, 1)]]
    (two, one, end) = await browser.listen(f"{HERE}/live")
    assert (two[0], one[0], end[0]) == ("part", "part", "end") and browser.asked("WatchRuns").parent == "projects/acme"
    rows = [[each for each in Page(html).ids if each.startswith("run-")] for _, html, _ in (two, one)]
    assert rows == [["run-r-3", "run-r-2", "run-r-1"], ["run-r-3", "run-r-1"]], "the newest first"
    assert Page(two[1]).ids[0] == "all-runs" and "failed" in Page(two[1]).text and "<script>alert" not in two[1]


async def test_two_runs_beside_each_other(browser: Browser) -> None:
    a = running(plan=Plan(hyperparameters=Hyperparameters(lora_r=8, seed=1, target_modules=["q"])))
    b = running(
        "projects/acme/runs/r-2", requested=Hyperparameters(lora_r=32, seed=1), dataset="projects/acme/datasets/e"
    )
    script(browser, a, b)
    page = await browser.page(f"{HERE}/compare?a=r-1&b=r-2")
    assert {"compared", "curves", "other-dataset"} <= set(page.ids) and "<strong>8</strong>" in page.html
    assert "<strong>32</strong>" in page.html and "<strong>AUTO</strong>" in page.html and "<td>1</td>" in page.html
    assert (await browser.http.get(f"{HERE}/compare?a=r-1")).status_code == 400


async def test_an_adapter_is_downloaded_as_one_verified_tar(browser: Browser) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 1500}
    header = DownloadHeader(files=[
        ArtifactFile(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
    ])  # fmt: skip
    chunks = [FileChunk(offset=0, data=b"{}"), FileChunk(offset=2, data=b"w" * 1500)]
    stream = [DownloadCheckpointResponse(header=header), *(DownloadCheckpointResponse(chunk=each) for each in chunks)]
    browser.services.scripts["DownloadCheckpoint"] = [stream]
    answer = await browser.http.get(f"{HERE}/r-1/checkpoints/120/adapter.tar")
    assert answer.headers["content-disposition"] == 'attachment; filename="acme-r-1-120.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == files  # type: ignore[union-attr]
    await browser.http.get(f"{HERE}/r-1/checkpoints/120/adapter.tar?format=gguf")
    assert browser.asked("DownloadCheckpoint").format == ADAPTER_FORMAT_GGUF
    assert (await browser.http.get(f"{HERE}/r-1/checkpoints/120/adapter.tar?format=exe")).status_code == 400
    for wrong in (FileChunk(offset=2, data=b"v" * 1500), FileChunk(offset=2, data=b"w" * 1501), None):
        rest = [DownloadCheckpointResponse(chunk=wrong)] if wrong else []
        browser.services.scripts["DownloadCheckpoint"] = [[*stream[:2], *rest]]
        with pytest.raises(httpx2.RemoteProtocolError):  # a browser calls that a failed download
            await browser.http.get(f"{HERE}/r-1/checkpoints/120/adapter.tar")
    browser.services.scripts["DownloadCheckpoint"] = [errors.PermissionDenied("readers take no weights")]
    assert (await browser.http.get(f"{HERE}/r-1/checkpoints/120/adapter.tar")).status_code == 403
