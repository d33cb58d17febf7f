"""A client that the services did not write: it learns the contract by gRPC reflection and makes its own stubs of it.

Run as a process of its own with a JSON file: {"addresses": {"ingest": "host:port", …}, "bundle": path, "archive": path,
"held_out": path, "key": API key, "out": path}. It takes the whole way from an empty project to a swapped adapter and
writes what it saw to "out". It imports nothing of Codegraft.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from grpc_tools import protoc

CHUNK = 1 << 20
MINUTE = 60.0


class Authorized(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends the API key with every call."""

    def __init__(self, key: str) -> None:
        self.header = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self.header]
        return continuation(details._replace(metadata=metadata), request)

    intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = intercept_unary_unary


def reflected_files(channel: grpc.Channel) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Every proto file behind the server's services, by name."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(**request: Any) -> Any:
        request_iterator = iter([reflection_pb2.ServerReflectionRequest(**request)])
        return next(iter(stub.ServerReflectionInfo(request_iterator, timeout=MINUTE)))

    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    services = [s.name for s in ask(list_services="").list_services_response.service]
    wanted = [ask(file_containing_symbol=name) for name in services]
    while wanted:
        for blob in wanted.pop().file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(blob)
            if file.name not in files:
                files[file.name] = file
                wanted += [ask(file_by_filename=name) for name in file.dependency if name not in files]
    return files


def make_stubs(channels: dict[str, grpc.Channel], folder: Path) -> None:
    """Writes Python stubs for all that the servers reflect into the folder, and puts it on the path."""
    files = {name: file for channel in channels.values() for name, file in reflected_files(channel).items()}
    ordered: list[descriptor_pb2.FileDescriptorProto] = []

    def add(name: str) -> None:  # protoc wants dependencies first
        if files[name] not in ordered:
            for dependency in files[name].dependency:
                add(dependency)
            ordered.append(files[name])

    for name in files:
        add(name)
    descriptors = folder / "contract.binpb"
    descriptors.write_bytes(descriptor_pb2.FileDescriptorSet(file=ordered).SerializeToString())
    ours = [name for name in files if name.startswith("codegraft/")]
    arguments = [
        "protoc",
        f"--descriptor_set_in={descriptors}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
    ]
    assert protoc.main([*arguments, *ours]) == 0
    sys.path.insert(0, str(folder))


def reason_of(error: grpc.RpcError) -> tuple[str, str]:
    """(status code name, ErrorInfo.reason) of a failed call."""
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return error.code().name, info.reason
    return error.code().name, ""


class WholePath:
    """The whole way, step by step; every step leaves what it saw in ``seen``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.seen: dict[str, Any] = {}
        self.channels = {
            name: grpc.intercept_channel(grpc.insecure_channel(address), Authorized(config["key"]))
            for name, address in config["addresses"].items()
        }
        folder = Path(tempfile.mkdtemp(prefix="stubs-", dir=Path(config["out"]).parent))
        make_stubs(self.channels, folder)

        def stub(service: str, file: str, name: str) -> Any:
            module = importlib.import_module(f"codegraft.{service}.v1.{file}_pb2_grpc")
            return getattr(module, f"{name}Stub")(self.channels[service])

        self.pb = {
            file: importlib.import_module(f"codegraft.{service}.v1.{file}_pb2")
            for service, files in {
                "common": ["split", "job"],
                "ingest": ["project", "source", "upload", "snapshot"],
                "scanner": ["scan", "verdict"],
                "trainer": ["run", "hyperparameters"],
                "inference": ["completion", "serving"],
            }.items()
            for file in files
        }
        self.projects = stub("ingest", "project", "ProjectService")
        self.sources = stub("ingest", "source", "SourceService")
        self.uploads = stub("ingest", "upload", "UploadService")
        self.snapshots = stub("ingest", "snapshot", "SnapshotService")
        self.scans = stub("scanner", "scan", "ScanService")
        self.runs = stub("trainer", "run", "RunService")
        self.completions = stub("inference", "completion", "CompletionService")
        self.serving = stub("inference", "serving", "ServingService")
        self.parent = ""

    # --- sources ---

    def create_project(self) -> None:
        pb = self.pb["project"]
        request = pb.CreateProjectRequest(project_id="demo", request_id="one")
        self.parent = self.projects.CreateProject(request, timeout=MINUTE).project.name
        again = self.projects.CreateProject(request, timeout=MINUTE).project
        self.seen["create_is_idempotent"] = again.name == self.parent

    def bad_input(self) -> None:
        """What a caller gets for the mistakes the contract lists."""
        project, source, scan, run = (self.pb[name] for name in ("project", "source", "scan", "run"))
        completion = self.pb["completion"]
        calls = {
            "unknown project": lambda: self.projects.GetProject(project.GetProjectRequest(name="projects/none")),
            "bad name": lambda: self.projects.CreateProject(project.CreateProjectRequest(project_id="No Good")),
            "negative page size": lambda: self.projects.ListProjects(project.ListProjectsRequest(page_size=-1)),
            "unknown source": lambda: self.sources.GetSource(source.GetSourceRequest(name=f"{self.parent}/sources/x")),
            "bad git url": lambda: self.sources.CreateSource(
                source.CreateSourceRequest(
                    parent=self.parent, source=source.Source(git=source.GitSource(url="ext::sh"))
                )
            ),
            "unknown snapshot": lambda: self.scans.CreateScan(
                scan.CreateScanRequest(parent=self.parent, snapshot=f"{self.parent}/snapshots/0123")
            ),
            "no dataset": lambda: self.runs.CreateRun(run.CreateRunRequest(parent=self.parent)),
            "empty prompt": lambda: list(
                self.completions.Complete(completion.CompleteRequest(parent=self.parent), timeout=MINUTE)
            ),
        }
        self.seen["bad_input"] = {}
        for name, call in calls.items():
            try:
                call()
                self.seen["bad_input"][name] = ("OK", "")
            except grpc.RpcError as error:
                self.seen["bad_input"][name] = reason_of(error)

    def upload(self, path: Path) -> str:
        pb, data = self.pb["upload"], path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()

        def parts() -> Iterator[Any]:
            header = pb.UploadHeader(parent=self.parent, sha256=digest, size=len(data), filename=path.name)
            yield pb.UploadContentRequest(header=header)
            for offset in range(0, len(data), CHUNK):
                chunk = pb.UploadChunk(offset=offset, data=data[offset : offset + CHUNK])
                yield pb.UploadContentRequest(chunk=chunk)

        done = self.uploads.UploadContent(parts(), timeout=MINUTE).upload
        assert done.complete and done.sha256 == digest, done
        return str(done.name)

    def add_sources(self) -> None:
        pb, split = self.pb["source"], self.pb["split"]
        archive, held_out = Path(self.config["archive"]), Path(self.config["held_out"])
        wanted = {
            "repo": pb.Source(bundle=pb.BundleSource(upload=self.upload(Path(self.config["bundle"])))),
            "package": pb.Source(archive=pb.ArchiveSource(upload=self.upload(archive)), exclude=["masked.py"]),
            "held-out": pb.Source(
                file=pb.FileSource(upload=self.upload(held_out), path=held_out.name), split=split.SPLIT_TEST
            ),
        }
        self.seen["sources"] = {}
        for id_, source in wanted.items():
            request = pb.CreateSourceRequest(parent=self.parent, source_id=id_, source=source, request_id=id_)
            name = self.sources.CreateSource(request, timeout=MINUTE).source.name
            for message in self.sources.WatchSource(pb.WatchSourceRequest(name=name), timeout=MINUTE):
                state = pb.SourceState.Name(message.source.state)
                if state in ("SOURCE_STATE_READY", "SOURCE_STATE_FAILED"):
                    failure = message.source.failure
                    self.seen["sources"][id_] = {
                        "state": state,
                        "files": message.source.file_count,
                        "commit": message.source.commit,
                        "failure": f"{failure.reason} {failure.message}".strip(),
                    }
                    break

    # --- scan ---

    def scan(self) -> None:
        pb, verdict, job = self.pb["scan"], self.pb["verdict"], self.pb["job"]
        request = self.pb["snapshot"].CreateSnapshotRequest(parent=self.parent)
        snapshot = self.snapshots.CreateSnapshot(request, timeout=MINUTE).snapshot
        again = self.snapshots.CreateSnapshot(request, timeout=MINUTE).snapshot
        self.seen["snapshot"] = {"files": snapshot.file_count, "same_again": again.digest == snapshot.digest}
        settings = pb.ScanSettings(max_tokens_per_file=256, window_tokens=256)
        created = self.scans.CreateScan(
            pb.CreateScanRequest(parent=self.parent, snapshot=snapshot.name, settings=settings, request_id="scan"),
            timeout=MINUTE,
        ).scan
        scan = created
        for message in self.scans.WatchScan(pb.WatchScanRequest(name=created.name), timeout=5 * MINUTE):
            scan = message.scan
        verdicts = self.scans.ListVerdicts(
            pb.ListVerdictsRequest(parent=created.name, page_size=1000), timeout=MINUTE
        ).verdicts
        self.seen["scan"] = {
            "state": job.JobState.Name(scan.status.state),
            "failure": scan.status.failure.message,
            "files": scan.report.file_count,
            "accepted": scan.report.accepted_count,
            "rejected": scan.report.rejected_count,
            "dataset": scan.dataset,
            "verdicts": {
                f"{v.source.rsplit('/', 1)[1]}:{v.path}": {
                    "reason": verdict.VerdictReason.Name(v.reason).removeprefix("VERDICT_REASON_"),
                    "split": self.pb["split"].Split.Name(v.split),
                    "loss": v.loss if v.HasField("loss") else None,
                    "sha256": v.sha256,
                }
                for v in verdicts
            },
        }

    # --- train, and swap under a running stream ---

    def complete(self, **fields: Any) -> dict[str, Any]:
        """One completion, whole: what it started on, its text, how and when it ended."""
        pb = self.pb["completion"]
        prompt = pb.CodePrompt(path="client.py", prefix='"""A client."""\n\nimport os\n\n\ndef main(')
        request = pb.CompleteRequest(parent=self.parent, prompt=prompt, **fields)
        result: dict[str, Any] = {"text": "", "begin": time.time(), "finished": False}
        for message in self.completions.Complete(request, timeout=2 * MINUTE):
            match message.WhichOneof("part"):
                case "started":
                    result["sha256"] = message.started.adapter_sha256
                    result["checkpoint"] = message.started.checkpoint
                case "delta":
                    result["text"] += message.delta.text
                case "finished":
                    result["finished"] = True
                    result["reason"] = pb.FinishReason.Name(message.finished.reason)
                    result["tokens"] = message.finished.usage.completion_tokens
        result["end"] = time.time()
        return result

    def long_stream(self) -> dict[str, Any]:
        pb = self.pb["completion"]
        return self.complete(
            stop=pb.StopRule(max_tokens=60), sampling=pb.Sampling(temperature=1.0, seed=7, repetition_penalty=1.1)
        )

    def serving_status(self) -> Any:
        return self.serving.GetServing(self.pb["serving"].GetServingRequest(parent=self.parent), timeout=MINUTE)

    def train(self) -> None:
        pb, job = self.pb["run"], self.pb["job"]
        settings = self.pb["hyperparameters"].Hyperparameters(
            lora_r=8, learning_rate=2e-3, train_steps=4, batch_size=2, context_length=128, warmup_steps=1,
            eval_steps=2, max_eval_tokens=256, proof_places=2, seed=1,
        )  # fmt: skip
        self.complete(stop=self.pb["completion"].StopRule(max_tokens=2))  # the model is loaded from here on
        created = self.runs.CreateRun(
            pb.CreateRunRequest(parent=self.parent, hyperparameters=settings, request_id="run"), timeout=MINUTE
        ).run
        streams: list[dict[str, Any]] = []
        stop = threading.Event()

        def keep_streaming() -> None:  # an editor that always has one completion open
            while not stop.is_set():
                try:
                    streams.append(self.long_stream())
                except grpc.RpcError as error:
                    streams.append({"finished": False, "sha256": "", "error": str(error)})

        editor = threading.Thread(target=keep_streaming)
        events, run, bests = [], created, []
        try:
            for message in self.runs.WatchRun(pb.WatchRunRequest(name=created.name), timeout=8 * MINUTE):
                run = message.run
                if message.HasField("event"):
                    kind = message.event.WhichOneof("event")
                    events.append((message.event.sequence, kind))
                    if kind == "evaluation" and not editor.ident:  # the base model's, before the first step
                        editor.start()
                    if kind == "best":
                        bests.append(message.event.best.sha256)
            deadline = time.time() + MINUTE
            while bests and self.serving_status().status.active_sha256 != bests[-1] and time.time() < deadline:
                time.sleep(0.1)
            swapped_at = time.time()
        finally:
            stop.set()
            if editor.ident:
                editor.join()
        self.seen["run"] = {
            "state": job.JobState.Name(run.status.state),
            "failure": run.status.failure.message,
            "name": run.name,
            "events": events,
            "bests": bests,
            "base_test_loss": run.base_test_loss,
            "best_test_loss": run.best_test_loss,
            "best_checkpoint": run.best_checkpoint,
        }
        self.seen["streams"] = streams
        self.seen["swapped_at"] = swapped_at

    def serve(self) -> None:
        """The three policies, and what answers under each."""
        pb, completion = self.pb["serving"], self.pb["completion"]
        stop = completion.StopRule(max_tokens=8)
        best = self.seen["run"]["best_checkpoint"]
        seen = {"latest": self.complete(stop=stop), "again": self.complete(stop=stop)}
        self.set_serving(mode=pb.SERVING_MODE_OFF)
        seen["off"] = self.complete(stop=stop)
        self.set_serving(mode=pb.SERVING_MODE_PINNED, checkpoint=best)
        seen["pinned"] = self.complete(stop=stop)
        self.set_serving(mode=pb.SERVING_MODE_LATEST_BEST)
        seen["base_asked_for"] = self.complete(stop=stop, adapter=completion.AdapterChoice(base=True))
        self.seen["serve"] = seen
        try:
            checkpoint = f"{self.parent}/runs/none/checkpoints/1"
            self.set_serving(mode=pb.SERVING_MODE_PINNED, checkpoint=checkpoint)
            self.seen["bad_pin"] = ("OK", "")
        except grpc.RpcError as error:
            self.seen["bad_pin"] = reason_of(error)
        self.seen["after_bad_pin"] = self.complete(stop=stop)["sha256"]

    def set_serving(self, **fields: Any) -> None:
        """Sets the policy and waits until the replica has converged to it."""
        pb = self.pb["serving"]
        self.serving.SetServing(pb.SetServingRequest(parent=self.parent, **fields), timeout=MINUTE)
        deadline = time.time() + MINUTE
        while not self.serving_status().status.converged and time.time() < deadline:
            time.sleep(0.05)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    path = WholePath(config)
    for step in (path.create_project, path.bad_input, path.add_sources, path.scan, path.train, path.serve):
        begin = time.time()
        step()
        print(f"{step.__name__}: {time.time() - begin:.1f} s", flush=True)
    Path(config["out"]).write_text(json.dumps(path.seen, indent=1))


if __name__ == "__main__":
    main()
