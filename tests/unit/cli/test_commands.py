"""The commands over the wire: what they ask the services, what they print, and how they end."""

from __future__ import annotations

import inspect
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.access.v1.worker_pb2 import ListWorkersResponse, Worker
from codegraft.common.v1.job_pb2 import Failure, JobState, JobStatus, Progress
from codegraft.common.v1.model_pb2 import Model
from codegraft.common.v1.split_pb2 import Split
from codegraft.inference.v1 import completion_pb2, feedback_pb2, serving_pb2
from codegraft.ingest.v1 import project_pb2, snapshot_pb2, source_pb2, upload_pb2
from codegraft.scanner.v1 import scan_pb2, verdict_pb2
from codegraft.trainer.v1 import checkpoint_pb2, hyperparameters_pb2, model_pb2, run_event_pb2, run_pb2
from services.cli import train
from services.core import errors

Codegraft = Callable[..., Any]
SUCCEEDED = JobStatus(state=JobState.JOB_STATE_SUCCEEDED)


# --- projects and sources ---------------------------------------------------------------------------------------


def test_project_create_and_list(fake: Any, codegraft: Codegraft) -> None:
    project = project_pb2.Project(name="projects/acme", title="Acme")
    fake.answers["CreateProject"] = project_pb2.CreateProjectResponse(project=project)
    fake.answers["ListProjects"] = project_pb2.ListProjectsResponse(projects=[project])
    done = codegraft("project", "create", "acme", "--title", "Acme", "--exclude", "*.min.js", "--json")
    assert (done.code, json.loads(done.out)["name"]) == (0, "projects/acme")
    assert fake.last("CreateProject").project.exclude == ["*.min.js"]
    assert fake.last("CreateProject").request_id
    assert "acme" in codegraft("project", "list").out
    assert [p["title"] for p in json.loads(codegraft("project", "list", "--json").out)] == ["Acme"]


def test_project_delete_is_only_forced_when_asked(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["DeleteProject"] = project_pb2.DeleteProjectResponse()
    assert codegraft("project", "delete", "acme").code == 0
    assert not fake.last("DeleteProject").force
    assert codegraft("project", "delete", "acme", "--force").code == 0
    assert fake.last("DeleteProject").force


def source(**fields: Any) -> source_pb2.Source:
    return source_pb2.Source(
        name="projects/acme/sources/s", generation=1, fetched_generation=1, file_count=3, byte_count=42, **fields
    )


@pytest.fixture
def ingest(fake: Any) -> Any:
    upload = upload_pb2.Upload(name="projects/acme/uploads/" + "a" * 64, filename="u")
    ready = source(state=source_pb2.SOURCE_STATE_READY, skipped={"symlink": 2})
    fake.answers.update(
        GetUpload=upload_pb2.GetUploadResponse(upload=upload),
        UploadContent=upload_pb2.UploadContentResponse(upload=upload),
        CreateSource=source_pb2.CreateSourceResponse(source=source(state=source_pb2.SOURCE_STATE_PENDING)),
        WatchSource=[source_pb2.WatchSourceResponse(source=ready)],
    )
    return fake


def uploaded(fake: Any) -> bytes:
    return b"".join(part.chunk.data for part in fake.last("UploadContent")[1:])


def test_a_local_repository_travels_as_a_bundle(ingest: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    (tmp_path / "a.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "a.py").write_text("a = 2\n")
    done = codegraft("source", "add", "-p", "acme", "--git", str(tmp_path), "--test", "tests/**", "--subpath", "src")
    assert done.code == 0
    assert "uncommitted changes" in done.err
    assert "3 files" in done.err and "2 (symlink)" in done.err
    assert uploaded(ingest).startswith(b"# v2 git bundle")
    sent = ingest.last("CreateSource").source
    assert sent.bundle.upload.startswith("projects/acme/uploads/")
    assert sent.bundle.subpath == "src"
    assert [(rule.pattern, rule.split) for rule in sent.split_rules] == [("tests/**", Split.SPLIT_TEST)]


def test_a_url_is_fetched_by_the_service(ingest: Any, codegraft: Codegraft) -> None:
    url = "https://example.com/lib.git"
    assert codegraft("source", "add", "-p", "acme", "--git", url, "--ref", "v1", "--id", "lib").code == 0
    request = ingest.last("CreateSource")
    assert (request.source.git.url, request.source.git.ref, request.source_id) == (url, "v1", "lib")
    assert "UploadContent" not in ingest.requests


def test_archive_file_and_url(ingest: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    path = tmp_path / "held_out.py"
    path.write_text("x = 1\n")
    assert codegraft("source", "add", "-p", "acme", "--file", str(path), "--split", "test", "--json").code == 0
    sent = ingest.last("CreateSource").source
    assert (sent.file.path, sent.split, uploaded(ingest)) == ("held_out.py", Split.SPLIT_TEST, b"x = 1\n")
    assert codegraft("source", "add", "-p", "acme", "--archive", str(path), "--no-wait").code == 0
    assert ingest.last("CreateSource").source.WhichOneof("origin") == "archive"
    assert codegraft("source", "add", "-p", "acme", "--url", "https://example.com/a.zip").code == 0
    assert ingest.last("CreateSource").source.url.url == "https://example.com/a.zip"


def test_a_failed_fetch_is_an_error_with_its_hint(ingest: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    failure = Failure(reason="BROKEN_ARCHIVE", message="it is truncated", hint="Send it again.")
    failed = source(state=source_pb2.SOURCE_STATE_FAILED, failure=failure)
    ingest.answers["WatchSource"] = [source_pb2.WatchSourceResponse(source=failed)]
    (tmp_path / "a.zip").write_bytes(b"PK")
    done = codegraft("source", "add", "-p", "acme", "--archive", str(tmp_path / "a.zip"))
    assert done.code == 2
    assert "it is truncated" in done.err and "Send it again." in done.err


@pytest.mark.parametrize("arguments", [[], ["--git", ".", "--url", "https://example.com/x"]])
def test_exactly_one_origin(fake: Any, codegraft: Codegraft, arguments: list[str]) -> None:
    assert codegraft("source", "add", "-p", "acme", *arguments).code == 2


def test_a_missing_file_is_told(ingest: Any, codegraft: Codegraft) -> None:
    done = codegraft("source", "add", "-p", "acme", "--file", "/nonexistent/a.py")
    assert done.code == 2
    assert "/nonexistent/a.py" in done.err


def test_sync_and_remove_take_ids_and_full_names(ingest: Any, codegraft: Codegraft) -> None:
    ingest.answers["SyncSource"] = source_pb2.SyncSourceResponse(source=source(state=source_pb2.SOURCE_STATE_PENDING))
    ingest.answers["DeleteSource"] = source_pb2.DeleteSourceResponse()
    assert codegraft("source", "sync", "-p", "acme", "s").code == 0
    assert ingest.last("SyncSource").name == "projects/acme/sources/s"
    assert codegraft("source", "remove", "-p", "acme", "projects/acme/sources/s").code == 0
    assert codegraft("source", "remove", "-p", "acme", "Bad Id").code == 2


# --- scans ------------------------------------------------------------------------------------------------------


def scan(status: JobStatus = SUCCEEDED) -> scan_pb2.Scan:
    return scan_pb2.Scan(
        name="projects/acme/scans/sc-1",
        status=status,
        dataset="projects/acme/datasets/d1",
        report=scan_pb2.ScanReport(
            file_count=3,
            accepted_count=2,
            rejected_count=1,
            reasons={"ACCEPTED": scan_pb2.ScanCount(files=2), "NOT_TEXT": scan_pb2.ScanCount(files=1, bytes=1234)},
            train=scan_pb2.ScanCount(files=1, tokens=1000),
            test=scan_pb2.ScanCount(files=1, tokens=100),
        ),
    )


def running(progress: Progress) -> JobStatus:
    return JobStatus(state=JobState.JOB_STATE_RUNNING, progress=progress)


def test_scan_start_takes_a_snapshot_and_follows(fake: Any, codegraft: Codegraft) -> None:
    snapshot = snapshot_pb2.Snapshot(name="projects/acme/snapshots/abc")
    fake.answers.update(
        CreateSnapshot=snapshot_pb2.CreateSnapshotResponse(snapshot=snapshot),
        CreateScan=scan_pb2.CreateScanResponse(scan=scan(JobStatus(state=JobState.JOB_STATE_QUEUED))),
        WatchScan=[
            scan_pb2.WatchScanResponse(scan=scan(running(Progress(done=1, total=3, unit="files")))),
            scan_pb2.WatchScanResponse(scan=scan()),
        ],
    )
    done = codegraft("scan", "start", "-p", "acme", "--max-loss", "2.5", "--no-loss-filter", "--watch")
    assert done.code == 0, done.err
    request = fake.last("CreateScan")
    assert request.snapshot == snapshot.name
    assert (request.settings.max_loss, request.settings.loss_filter) == (2.5, False)
    assert not request.settings.HasField("max_file_bytes"), "what is not given is the service's default"
    assert "NOT_TEXT" in done.out and "1,234" in done.out
    assert "2 of 3 files accepted" in done.err


def test_a_failed_scan_ends_with_its_reason(fake: Any, codegraft: Codegraft) -> None:
    failure = Failure(reason="EMPTY_DATASET", message="no file passed", hint="Raise max_loss.")
    failed = scan(JobStatus(state=JobState.JOB_STATE_FAILED, failure=failure))
    fake.answers.update(
        CreateScan=scan_pb2.CreateScanResponse(scan=failed), WatchScan=[scan_pb2.WatchScanResponse(scan=failed)]
    )
    done = codegraft("scan", "start", "-p", "acme", "--snapshot", "abc", "--watch", "--json")
    assert done.code == 4
    assert json.loads(done.err.splitlines()[-1])["error"]["reason"] == "EMPTY_DATASET"
    assert fake.last("CreateScan").snapshot == "projects/acme/snapshots/abc"


def test_scan_log_filters_and_pages(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["ListScans"] = scan_pb2.ListScansResponse(scans=[scan()])
    verdict = verdict_pb2.Verdict(
        path="a[b].py",
        source="projects/acme/sources/s",
        reason=verdict_pb2.VERDICT_REASON_LOTS_OF_DIGITS,
        detail="share 0.91",
    )
    fake.answers["ListVerdicts"] = lambda request: scan_pb2.ListVerdictsResponse(
        verdicts=[verdict], next_page_token="" if request.page_token else "next"
    )
    done = codegraft("scan", "log", "-p", "acme", "--rejected", "--reason", "lots-of-digits")
    assert done.out.splitlines() == ["LOTS_OF_DIGITS    s: a[b].py  (share 0.91)"] * 2
    request = fake.last("ListVerdicts")
    assert request.parent == "projects/acme/scans/sc-1"
    assert request.filter.HasField("accepted") and not request.filter.accepted
    assert list(request.filter.reasons) == [verdict_pb2.VERDICT_REASON_LOTS_OF_DIGITS]
    assert json.loads(codegraft("scan", "log", "-p", "acme", "--json").out.splitlines()[0])["path"] == "a[b].py"
    assert not fake.last("ListVerdicts").filter.HasField("accepted")


def test_scan_log_refuses_nonsense(fake: Any, codegraft: Codegraft) -> None:
    assert codegraft("scan", "log", "-p", "acme", "--accepted", "--rejected").code == 2
    done = codegraft("scan", "log", "-p", "acme", "--reason", "bad")
    assert done.code == 2 and "NOT_TEXT" in done.err


def test_no_scan_yet(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["ListScans"] = scan_pb2.ListScansResponse()
    assert codegraft("scan", "show", "-p", "acme").code == 3
    assert "no scan yet" in codegraft("scan", "list", "-p", "acme").err


# --- runs -------------------------------------------------------------------------------------------------------


RUN = "projects/acme/runs/r-1"


def run(**fields: Any) -> run_pb2.Run:
    fields.setdefault("status", SUCCEEDED)
    return run_pb2.Run(name=RUN, base_test_loss=1.5, best_test_loss=1.2, last_sequence=3, **fields)


def message(sequence: int, **event: Any) -> run_pb2.WatchRunResponse:
    return run_pb2.WatchRunResponse(run=run(), event=run_event_pb2.RunEvent(sequence=sequence, **event))


STORY = [
    message(1, evaluation=run_event_pb2.EvalMetrics(step=0, test_loss=1.5)),
    message(2, step=run_event_pb2.StepMetrics(step=1, train_loss=1.4, learning_rate=1e-3)),
    message(3, best=checkpoint_pb2.Checkpoint(step=1, test_loss=1.2, sha256="f" * 64)),
]


@pytest.fixture
def trainer(fake: Any) -> Any:
    fake.answers.update(
        CreateRun=run_pb2.CreateRunResponse(run=run()),
        GetRun=run_pb2.GetRunResponse(run=run()),
        WatchRun=STORY,
        ListRuns=run_pb2.ListRunsResponse(runs=[run()]),
        CancelRun=run_pb2.CancelRunResponse(run=run()),
        ListCheckpoints=run_pb2.ListCheckpointsResponse(checkpoints=[STORY[2].event.best]),
    )
    return fake


def test_train_start_sends_what_is_given_and_nothing_else(trainer: Any, codegraft: Codegraft) -> None:
    done = codegraft(
        *("train", "start", "-p", "acme", "--lora-r", "32", "--low-gpu-memory-mode", "off", "--seed", "0"),
        *("--target-module", "q_proj", "--learning-rate", "1e-3", "--watch"),
    )
    assert done.code == 0, done.err
    sent = trainer.last("CreateRun").hyperparameters
    assert {field.name for field, _ in sent.ListFields()} == {
        "lora_r",
        "low_gpu_memory_mode",
        "seed",
        "target_modules",
        "learning_rate",
    }
    assert not sent.low_gpu_memory_mode
    assert "base model: test loss 1.5000" in done.err
    assert "1.5000 -> 1.2000 (-20.0 %)" in done.err


def test_train_plan_trains_nothing_and_tells_why(trainer: Any, codegraft: Codegraft) -> None:
    setting = hyperparameters_pb2.PlannedSetting(name="lora_r", value="32", given=True)
    found = hyperparameters_pb2.Plan(
        settings=[setting, hyperparameters_pb2.PlannedSetting(name="seed", value="0", why="always")],
        train_tokens=1200,
        epochs=2.5,
    )
    found.hyperparameters.train_steps, found.estimated_seconds = 40, 90
    trainer.answers["PlanRun"] = run_pb2.PlanRunResponse(plan=found)
    given = ("-p", "acme", "--lora-r", "32", "--low-gpu-memory-mode", "on", "--dataset", "abc", "--model", "tiny")
    done = codegraft("train", "plan", *given)
    assert done.code == 0, done.err
    sent = trainer.last("PlanRun")
    assert (sent.dataset, sent.base_model) == ("projects/acme/datasets/abc", "tiny")
    assert sent.hyperparameters == hyperparameters_pb2.Hyperparameters(lora_r=32, low_gpu_memory_mode=True)
    assert "always" in done.out and "given" in done.out and "40 steps over 1,200 tokens (2.5 passes)" in done.err
    assert json.loads(codegraft("train", "plan", *given, "--json").out)["estimated_seconds"] == 90
    assert "CreateRun" not in trainer.requests


def test_every_hyperparameter_has_its_option(codegraft: Codegraft) -> None:
    options = inspect.signature(train.start).parameters.keys()
    for field in hyperparameters_pb2.Hyperparameters.DESCRIPTOR.fields:
        name = field.name.removesuffix("s") if field.is_repeated else field.name
        assert name in options
        assert "--" + name.replace("_", "-") in codegraft("train", "start", "--help").out


def test_train_watch_prints_one_json_event_a_line(trainer: Any, codegraft: Codegraft) -> None:
    done = codegraft("train", "watch", "-p", "acme", "--json")
    assert trainer.requests["GetRun"][0].name == "projects/acme/runs/latest"
    assert [json.loads(line)["sequence"] for line in done.out.splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize(("command", "thing", "module"), [
    ("train", "run", run_pb2), ("scan", "scan", scan_pb2), ("source", "source", source_pb2),
])  # fmt: skip
def test_a_list_goes_on_with_everybodys_changes(
    fake: Any, codegraft: Codegraft, command: str, thing: str, module: Any
) -> None:
    made = {"run": run(), "scan": scan(), "source": source()}[thing]
    change = getattr(module, f"Watch{thing.title()}sResponse")
    fake.answers[f"Watch{thing.title()}s"] = [change(**{thing: made}), change(removed=f"projects/acme/{thing}s/x-9")]
    there, removed = codegraft(command, "list", "-p", "acme", "--follow").out.splitlines()
    assert there.startswith(f"{made.name.rpartition('/')[2]}  ") and removed == "x-9  removed"
    assert fake.last(f"Watch{thing.title()}s").parent == "projects/acme"
    out = codegraft(command, "list", "-p", "acme", "--follow", "--json").out
    first, second = map(json.loads, out.splitlines())
    assert (first[thing]["name"], second["removed"]) == (made.name, f"projects/acme/{thing}s/x-9")


def test_workers_that_are_idle_are_listed(fake: Any, codegraft: Codegraft) -> None:
    idle, busy = Worker(name="workers/host-1-0", kind="scan"), Worker(name="workers/host-2-0", kind="run", job=RUN)
    fake.answers["ListWorkers"] = ListWorkersResponse(workers=[idle, busy])
    done = codegraft("workers")
    assert "host-1-0  scans  idle" in done.out and RUN in done.out
    assert json.loads(codegraft("workers", "--json").out)[0]["name"] == "workers/host-1-0"


def test_train_list_show_cancel(trainer: Any, codegraft: Codegraft) -> None:
    assert "1.2000" in codegraft("train", "list", "-p", "acme").out
    assert "ffffffffffff" in codegraft("train", "show", "-p", "acme", "r-1").out
    assert codegraft("train", "cancel", "-p", "acme", "r-1").code == 0
    assert trainer.last("CancelRun").name == RUN


def test_train_pause_resume_keep(trainer: Any, codegraft: Codegraft) -> None:
    pausing = run(status=JobStatus(state=JobState.JOB_STATE_RUNNING, pause_requested=True))
    trainer.answers["PauseRun"] = run_pb2.PauseRunResponse(run=pausing)
    done = codegraft("train", "pause", "-p", "acme")
    assert trainer.last("PauseRun").name == RUN and "train resume" in done.err
    queued = JobStatus(state=JobState.JOB_STATE_QUEUED, progress=Progress(message="waits, 3rd in the queue"))
    trainer.answers["ResumeRun"] = run_pb2.ResumeRunResponse(run=run(status=queued))
    assert json.loads(codegraft("train", "resume", "-p", "acme", "r-1", "--json").out)["status"]["state"]
    assert trainer.last("ResumeRun").name == RUN
    trainer.answers["GetRun"] = run_pb2.GetRunResponse(run=run(status=queued))
    assert "3rd in the queue" in codegraft("train", "show", "-p", "acme").err
    kept = checkpoint_pb2.Checkpoint(name=f"{RUN}/checkpoints/20", kept=True)
    trainer.answers["KeepCheckpoint"] = run_pb2.KeepCheckpointResponse(checkpoint=kept)
    assert codegraft("train", "keep", "-p", "acme", "r-1/20").code == 0
    assert (trainer.last("KeepCheckpoint").name, trainer.last("KeepCheckpoint").kept) == (kept.name, True)
    assert codegraft("train", "keep", "-p", "acme", "r-1", "--off").code == 0
    assert (trainer.last("KeepCheckpoint").name, trainer.last("KeepCheckpoint").kept) == (
        f"{RUN}/checkpoints/best",
        False,
    )


@pytest.mark.parametrize(("given", "step"), [("r-1", "best"), ("r-1/20", "20"), (RUN, "best")])
def test_train_start_from_an_earlier_adapter(trainer: Any, codegraft: Codegraft, given: str, step: str) -> None:
    assert codegraft("train", "start", "-p", "acme", "--from", given).code == 0
    assert trainer.last("CreateRun").initial_checkpoint == f"{RUN}/checkpoints/{step}"


def test_train_plot(trainer: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    assert codegraft("train", "plot", "-p", "acme", "-o", str(tmp_path / "loss.png")).code == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(codegraft("train", "plot", "-p", "acme", "--json").out) == {
        "train": [[1, 1.4]],
        "test": [[0, 1.5]],
        "best": [1, 1.2],
        "learning_rate": [[1, 1e-3]],
    }


def test_train_shows_the_proof(trainer: Any, codegraft: Codegraft) -> None:
    proof = run_event_pb2.Proof(
        base=run_event_pb2.ProofFigures(
            test_loss=1.5, foreign_loss=2.0, next_line_exact_match=0.1, next_line_edit_similarity=0.4
        ),
        adapter=run_event_pb2.ProofFigures(
            test_loss=1.2, foreign_loss=2.01, next_line_exact_match=0.3, next_line_edit_similarity=0.55
        ),
        test_files=7,
        next_line_places=40,
        test_loss_p=0.0001,
        next_line_p=0.012,
        verdict="better than the base model on test loss and next lines",
    )
    trainer.answers.update(
        GetRun=run_pb2.GetRunResponse(run=run(proof=proof)), WatchRun=[message(1, proof=proof), *STORY[1:]]
    )
    done = codegraft("train", "show", "-p", "acme")
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "test loss (7 files) 1.5000 1.2000 -20.0 % 0.0001" in rows
    assert "loss on foreign code 2.0000 2.0100 +0.5 % -" in rows
    assert "next line, exact match (40 places) 10.0 % 30.0 % +20.0 points -" in rows
    assert "next line, edit similarity 40.0 % 55.0 % +15.0 points 0.0120" in rows
    assert not any("filled-in" in row for row in rows) and proof.verdict in " ".join(done.err.split())
    told = " ".join(codegraft("train", "watch", "-p", "acme").err.split())
    assert f"proof: test loss 1.5000 -> 1.2000, next lines 40.0 -> 55.0 % alike; {proof.verdict}" in told


def test_a_cancelled_run_ends_the_watch_with_130(trainer: Any, codegraft: Codegraft) -> None:
    trainer.answers["GetRun"] = run_pb2.GetRunResponse(run=run(status=JobStatus(state=JobState.JOB_STATE_CANCELLED)))
    assert codegraft("train", "watch", "-p", "acme").code == 130


# --- serving and completions ------------------------------------------------------------------------------------


@pytest.fixture
def inference(fake: Any) -> Any:
    started = completion_pb2.Started(model="smollm2-135m", checkpoint=f"{RUN}/checkpoints/20")
    finished = completion_pb2.Finished(reason=completion_pb2.FINISH_REASON_STOP)
    fake.answers.update(
        Complete=[
            completion_pb2.CompleteResponse(started=started),
            completion_pb2.CompleteResponse(delta=completion_pb2.Delta(text="return [a]")),
            completion_pb2.CompleteResponse(delta=completion_pb2.Delta(text=" + 1")),
            completion_pb2.CompleteResponse(finished=finished),
        ],
        SetServing=serving_pb2.SetServingResponse(serving=serving_pb2.Serving(name="projects/acme/serving")),
        GetCheckpoint=run_pb2.GetCheckpointResponse(checkpoint=checkpoint_pb2.Checkpoint(name=f"{RUN}/checkpoints/20")),
    )
    return fake


def test_complete_streams_the_text_to_stdout(inference: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(a):\n    \nx = f(1)\n")
    done = codegraft("complete", "-p", "acme", f"{tmp_path}/a.py:2", "--path", "src/a.py", "--max-tokens", "8")
    assert (done.code, done.out) == (0, "return [a] + 1\n")
    assert "r-1/20" in done.err and "ended by stop" in done.err
    request = inference.last("Complete")
    assert (request.prompt.prefix, request.prompt.suffix) == ("def f(a):\n    ", "\nx = f(1)\n")
    assert (request.prompt.path, request.stop.max_tokens) == ("src/a.py", 8)
    assert request.adapter.WhichOneof("choice") is None


def test_complete_reads_stdin_and_files(
    inference: Any, codegraft: Codegraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def g("))
    (tmp_path / "suffix.py").write_text("\n    pass\n")
    done = codegraft(
        *("complete", "-p", "acme", "--prefix-file", "-", "--suffix-file", str(tmp_path / "suffix.py")),
        *("--adapter", "r-1/20", "--language", "Python", "--json"),
    )
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == ["", "return [a]", " + 1", ""]
    request = inference.last("Complete")
    assert (request.prompt.prefix, request.prompt.suffix) == ("def g(", "\n    pass\n")
    assert (request.prompt.path, request.prompt.language) == ("", "Python")
    assert request.adapter.checkpoint == f"{RUN}/checkpoints/20"


@pytest.fixture
def several(inference: Any) -> Any:
    """Two completions of a prompt whose parts come mixed, with the probabilities of their tokens."""

    def logprob(text: bytes, share: float, *top: tuple[bytes, float]) -> Any:
        likeliest = [completion_pb2.TopLogprob(text=text, logprob=math.log(share)) for text, share in top]
        return completion_pb2.TokenLogprob(text=text, logprob=math.log(share), top=likeliest)

    def delta(index: int, text: str, *logprobs: Any) -> Any:
        made = completion_pb2.Delta(index=index, text=text, logprobs=logprobs, tokens=len(logprobs))
        return completion_pb2.CompleteResponse(delta=made)

    def finished(index: int) -> Any:
        made = completion_pb2.Finished(index=index, reason=completion_pb2.FINISH_REASON_LENGTH)
        return completion_pb2.CompleteResponse(finished=made)

    inference.answers["Complete"] = [
        completion_pb2.CompleteResponse(started=completion_pb2.Started(model="smollm2-135m")),
        delta(0, "a", logprob(b"a", 0.5, (b"a", 0.5), (b" b", 0.25))),
        delta(1, "x", logprob(b"x", 0.125)),
        delta(0, "\né", logprob(b"\n\xc3", 0.25), logprob(b"\xa9", 1.0)),
        finished(0),
        finished(1),
    ]
    return inference


def test_several_completions_are_printed_one_below_the_other(several: Any, codegraft: Codegraft) -> None:
    done = codegraft("complete", "-p", "acme", "--prefix", "x", "--n", "2", "--temperature", "1")
    assert done.code == 0 and done.out.startswith("--- 1\na\né\n") and "--- 2\nx\n" in done.out
    assert done.err.count("ended by length") == 2
    sampling = several.last("Complete").sampling
    assert sampling.n == 2 and not sampling.HasField("logprobs")


def test_log_probabilities_are_a_table_of_the_tokens(several: Any, codegraft: Codegraft) -> None:
    done = codegraft("complete", "-p", "acme", "--prefix", "x", "--n", "2", "--logprobs", "2")
    assert several.last("Complete").sampling.logprobs == 2
    lines = [line.split() for line in done.out.splitlines()]
    assert ["'a'", "-0.6931", "50.0%", "'a'", "50.0%", "'", "b'", "25.0%"] in lines
    assert [r"'\n\\xc3'", "-1.3863", "25.0%", "-"] in lines, "half a character, shown as bytes"
    done = codegraft("complete", "-p", "acme", "--prefix", "x", "--n", "2", "--logprobs", "2", "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [(one["index"], one["text"]) for one in found] == [(0, ""), (0, "a"), (1, "x"), (0, "\né"), (0, ""), (1, "")]
    assert [item["bytes"] for item in found[3]["logprobs"]] == [[10, 0xC3], [0xA9]]
    assert found[1]["logprobs"][0]["top"][1]["text"] == " b"
    assert found[4]["finished"]["reason"] == "FINISH_REASON_LENGTH"


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["nowhere.py:1"], 3), (["--prefix", "x", "--adapter", "r-1"], 2)]
)
def test_complete_refuses_nonsense(fake: Any, codegraft: Codegraft, arguments: list[str], code: int) -> None:
    assert codegraft("complete", "-p", "acme", *arguments).code == code


@pytest.mark.parametrize(
    ("policy", "mode", "asked"),
    [
        ("off", serving_pb2.SERVING_MODE_OFF, None),
        ("latest-best", serving_pb2.SERVING_MODE_LATEST_BEST, None),
        ("r-1/20", serving_pb2.SERVING_MODE_PINNED, f"{RUN}/checkpoints/20"),
        ("r-1", serving_pb2.SERVING_MODE_PINNED, f"{RUN}/checkpoints/best"),
        (RUN, serving_pb2.SERVING_MODE_PINNED, f"{RUN}/checkpoints/best"),
        (f"{RUN}/checkpoints/20", serving_pb2.SERVING_MODE_PINNED, f"{RUN}/checkpoints/20"),
    ],
)
def test_serve_set(inference: Any, codegraft: Codegraft, policy: str, mode: int, asked: str | None) -> None:
    assert codegraft("serve", "set", "-p", "acme", policy).code == 0
    request = inference.last("SetServing")
    assert request.mode == mode
    assert request.checkpoint == (f"{RUN}/checkpoints/20" if asked else "")
    if asked:
        assert inference.last("GetCheckpoint").name == asked


def test_serve_set_refuses_nonsense(inference: Any, codegraft: Codegraft) -> None:
    assert codegraft("serve", "set", "-p", "acme", "Latest Best").code == 2
    assert "SetServing" not in inference.requests


def test_serve_set_with_a_split(inference: Any, codegraft: Codegraft) -> None:
    assert codegraft("serve", "set", "-p", "acme", "off", "--split", "r-1/20", "--percent", "10").code == 0
    split = inference.last("SetServing").split
    assert (split.checkpoint, split.percent) == (f"{RUN}/checkpoints/20", 10)
    assert codegraft("serve", "set", "-p", "acme", "r-1/20", "--split", "base", "--percent", "5").code == 0
    assert (inference.last("SetServing").split.checkpoint, inference.last("SetServing").split.percent) == ("", 5)
    for half in (("--split", "base"), ("--percent", "5")):
        assert codegraft("serve", "set", "-p", "acme", "off", *half).code == 2
    assert codegraft("serve", "set", "-p", "acme", "off").code == 0
    assert not inference.last("SetServing").HasField("split")


def test_serve_approve(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["GetServing"] = serving_pb2.GetServingResponse()
    assert codegraft("serve", "approve", "-p", "acme").code == 4 and "ApproveServing" not in fake.requests
    waiting = serving_pb2.Serving(waiting_checkpoint=f"{RUN}/checkpoints/20", waiting_test_loss=1.5)
    fake.answers["GetServing"] = serving_pb2.GetServingResponse(serving=waiting)
    shown = codegraft("serve", "show", "-p", "acme").err
    assert f"{RUN}/checkpoints/20" in shown and "1.5000" in shown and "serve approve" in shown
    fake.answers["ApproveServing"] = serving_pb2.ApproveServingResponse()
    assert codegraft("serve", "approve", "-p", "acme").code == 0
    assert fake.last("ApproveServing").checkpoint == f"{RUN}/checkpoints/20"
    assert codegraft("serve", "approve", "-p", "acme", "r-1/40").code == 0
    assert fake.last("ApproveServing").checkpoint == f"{RUN}/checkpoints/40"


def test_serve_show(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["GetServing"] = serving_pb2.GetServingResponse(
        serving=serving_pb2.Serving(
            mode=serving_pb2.SERVING_MODE_LATEST_BEST,
            wanted_checkpoint="c",
            history=[serving_pb2.ServedVersion(time=Timestamp(seconds=1_700_000_000), checkpoint="c", mode=3)],
        ),
        status=serving_pb2.ServingStatus(replica="one", streams={"": 2}, failure=Failure(message="wrong base")),
    )
    done = codegraft("serve", "show", "-p", "acme")
    assert "latest-best" in done.err and "wrong base" in done.err and "2 streams" in done.err
    assert "since    2023-11-14 22:13:20 pinned: c" in done.err


def test_models(fake: Any, codegraft: Codegraft) -> None:
    fake.answers["ListModels"] = run_pb2.ListModelsResponse(models=[Model(id="smollm2-135m", parameters=134_515_008)])
    assert "134,515,008" in codegraft("models").out
    assert json.loads(codegraft("models", "--json").out)[0]["id"] == "smollm2-135m"


def test_one_model_with_everything_that_is_known_of_it(fake: Any, codegraft: Codegraft) -> None:
    model = Model(id="store:m", fim_style="psm", fim_tokens=["<a>", "<b>", "<c>"], serving_bytes=16_200_000_000)
    fake.answers["GetModel"] = model_pb2.GetModelResponse(model=model)
    shown = codegraft("models", "show", "store:m").out
    assert fake.last("GetModel").id == "store:m"
    assert "prefix, suffix, middle" in shown and "<a> <b> <c>" in shown and "16.2" in shown
    assert json.loads(codegraft("models", "show", "store:m", "--json").out)["fim_style"] == "psm"


def test_a_model_is_pushed_without_what_is_none_of_its_files(fake: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    fake.answers["PushModel"] = model_pb2.PushModelResponse(model=Model(id="store:m"))
    for name, text in (("config.json", "{}"), ("model.safetensors", "abc"), ("model.bin", "x"), (".hidden.json", "x")):
        (tmp_path / name).write_text(text)
    done = codegraft("models", "push", str(tmp_path), "m")
    assert done.code == 0 and "--model store:m" in done.err
    header, *chunks = fake.last("PushModel")
    assert [(file.path, file.size) for file in header.header.files] == [("config.json", 2), ("model.safetensors", 3)]
    assert [(part.chunk.offset, part.chunk.data) for part in chunks] == [(0, b"{}"), (2, b"abc")]
    assert codegraft("models", "push", str(tmp_path / "none"), "m").code == 2


# --- how commands end -------------------------------------------------------------------------------------------


def test_every_error_has_an_exit_code_and_no_trace(fake: Any, codegraft: Codegraft) -> None:
    for error in errors.all_errors():
        if error is errors.CodegraftError or issubclass(error, errors.Unavailable | errors.Cancelled):
            continue
        fake.answers["GetServing"] = error("what went wrong", field="name", hint="the way out")
        done = codegraft("serve", "show", "-p", "acme")
        assert done.code in {1, 2, 3, 4, 5, 6, 130}, error
        assert "what went wrong" in done.err and "the way out" in done.err, error
        assert "Traceback" not in done.err, error


def test_kept_texts_are_written_a_line_each_and_deleted_when_asked(fake: Any, codegraft: Codegraft) -> None:
    kept = feedback_pb2.KeptCompletion(
        name="projects/acme/completions/c-base", shown='x = "ü"\n'.encode(), event=feedback_pb2.FEEDBACK_EVENT_SHOWN
    )
    fake.answers["ListKeptCompletions"] = feedback_pb2.ListKeptCompletionsResponse(completions=[kept, kept])
    done = codegraft("completions", "list", "-p", "acme", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == 2 and lines[0]["completion_id"] == "c-base" and lines[0]["event"] == "SHOWN"
    assert (lines[0]["shown"], lines[0]["accepted"]) == ('x = "ü"\n', "")
    shown = codegraft("completions", "list", "-p", "acme").out.splitlines()
    assert len(shown) == 3 and shown[1].split()[2:5] == ["base", "SHOWN", "8"]
    fake.answers["DeleteKeptCompletions"] = feedback_pb2.DeleteKeptCompletionsResponse(deleted=2)
    assert json.loads(codegraft("completions", "delete", "-p", "acme", "--yes", "--json").out) == {"deleted": 2}
    assert fake.last("DeleteKeptCompletions").parent == "projects/acme"


def test_acceptance_sets_versions_side_by_side(fake: Any, codegraft: Codegraft) -> None:
    best = feedback_pb2.AdapterAcceptance(
        adapter_sha256="a" * 64, checkpoint=f"{RUN}/checkpoints/20", shown=1200, accepted=300, rate=0.25, rate_low=0.2
    )
    other = feedback_pb2.AdapterAcceptance(adapter_sha256="b" * 64, shown=3)
    base = feedback_pb2.AdapterAcceptance(shown=100, accepted=7, rate=0.07)
    fake.answers["GetAcceptance"] = feedback_pb2.GetAcceptanceResponse(adapters=[best, base, other])
    done = codegraft("acceptance", "-p", "acme", "--days", "30")
    lines = done.out.splitlines()
    assert fake.last("GetAcceptance").window.seconds == 30 * 86400
    assert [line.split()[0] for line in lines[1:]] == [f"{RUN.rpartition('/')[2]}/20", "base", "b" * 12]
    assert "25.0%" in lines[1] and "7.0%" in lines[2]
    listed = json.loads(codegraft("acceptance", "-p", "acme", "--json").out)
    assert listed["adapters"][1]["accepted"] == "7" and not listed["adapters"][1]["adapter_sha256"]
    fake.answers["GetAcceptance"] = feedback_pb2.GetAcceptanceResponse()
    assert "no feedback" in codegraft("acceptance", "-p", "acme").err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidName, 2),
        (errors.ProjectNotFound, 3),
        (errors.NoDataset, 4),
        (errors.EtagMismatch, 4),
        (errors.ResourceExists, 4),
        (errors.QueueFull, 5),
        (errors.InternalError, 1),
        (errors.DigestMismatch, 1),
    ],
)
def test_exit_codes_mean_something(
    fake: Any, codegraft: Codegraft, error: type[errors.CodegraftError], code: int
) -> None:
    fake.answers["GetServing"] = error("no")
    done = codegraft("serve", "show", "-p", "acme", "--json")
    assert done.code == code
    assert json.loads(done.err)["error"]["reason"] == error.reason


def test_without_services_the_way_out_is_told(
    codegraft: Codegraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEGRAFT_DATA", str(tmp_path))
    for name in ("INGEST", "SCANNER", "TRAINER", "INFERENCE"):
        monkeypatch.delenv(f"CODEGRAFT_{name}_ADDRESS", raising=False)
    done = codegraft("project", "list")
    assert done.code == 5
    assert "codegraft up" in done.err


def test_a_defect_shows_no_trace_unless_asked(codegraft: Codegraft, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("services.cli.project.connect", broken)
    done = codegraft("project", "list")
    assert done.code == 1
    assert "boom" in done.err and "Traceback" not in done.err
    monkeypatch.setenv("CODEGRAFT_LOG_LEVEL", "debug")
    assert "Traceback" in codegraft("project", "list").err


def test_ctrl_c_is_130(codegraft: Codegraft, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("services.cli.project.connect", interrupted)
    assert codegraft("project", "list").code == 130


@pytest.mark.parametrize("group", ["", "project", "source", "credential", "snapshot", "scan", "train", "serve"])
def test_help_tells_the_exit_codes(codegraft: Codegraft, group: str) -> None:
    done = codegraft(*filter(None, [group]), "--help")
    assert done.code == 0
    assert "Exit codes" in done.out


def test_every_command_has_json(codegraft: Codegraft) -> None:
    from typer.main import get_command

    from services.cli.main import app

    def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        below = getattr(command, "commands", None)
        if below is None:
            return [path]
        return [leaf for name, child in below.items() for leaf in leaves(child, (*path, name))]

    found = leaves(get_command(app))
    assert len(found) >= 24
    for path in found:
        assert "--json" in codegraft(*path, "--help").out, path


def test_the_command_needs_no_torch() -> None:
    script = "import sys, services.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
