"""The records that the manifests in the object store tell of. Plain functions: nothing is read or written here.

What a manifest does not say stays empty. Times are those at which the store took the manifests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.common.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, JobStatus
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import Snapshot, SnapshotManifest, SnapshotSource
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest, VerdictsManifest
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.control.copies import Copies
from services.cli.control.documents import parsed
from services.core import names
from services.core.errors import EmptyDataset
from services.core.jobs.states import advance, new_status

NOTE = "rebuilt from the manifests in the object store; the metrics of its steps, its plan and its title are lost"
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest as the store has it."""

    name: str
    """Resource name of the artifact."""
    text: bytes
    modified: datetime


@dataclass(slots=True)
class Rebuilt:
    """The records, each list by name."""

    projects: list[Project] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    stories: dict[str, list[RunEvent]] = field(default_factory=dict)
    """By run."""
    lost_sources: list[SnapshotSource] = field(default_factory=list)
    """Sources as the newest snapshot of their project names them, of which there is no copy: they were removed, or are
    older than copies. They cannot be made again from that alone."""
    unreadable: list[str] = field(default_factory=list)
    """Artifacts whose manifest is damaged."""


def records(found: Iterable[Found], copies: Copies) -> Rebuilt:
    """The records of everything that was found, but in projects that were deleted.

    Args:
        copies: of records. A project without one is known by what is in it.
    """
    made = Rebuilt()
    born: dict[str, datetime] = {}
    snapshots = _Kind(names.SNAPSHOT, SnapshotManifest)
    datasets = _Kind(names.DATASET, DatasetManifest)
    verdicts = _Kind(names.SCAN, VerdictsManifest)
    adapters = _Kind(names.CHECKPOINT, AdapterManifest)
    for one in sorted(found, key=lambda found: found.name):
        for kind in (snapshots, datasets, verdicts, adapters):
            project = names.project_of(one.name)
            if project not in copies.deleted and kind.takes(one, made.unreadable):
                born[project] = min(born.get(project, one.modified), one.modified)
    copied = {project.name for project in copies.projects}
    made.projects = copies.projects + [
        Project(name=name, create_time=_stamp(at), update_time=_stamp(at))
        for name, at in sorted(born.items())
        if name not in copied
    ]
    made.snapshots = [_snapshot(manifest, at) for manifest, at in snapshots.found]
    there = {source.name for source in copies.sources}
    made.lost_sources = [one for one in _sources(snapshots.found) if one.source not in there]
    made.scans = [_scan(manifest, at, datasets.found) for manifest, at in verdicts.found]
    made.datasets = [_dataset(manifest, at, made.scans) for manifest, at in datasets.found]
    of_run: defaultdict[str, list[tuple[AdapterManifest, datetime]]] = defaultdict(list)
    for adapter in adapters.found:
        of_run[adapter[0].name.rpartition("/checkpoints/")[0]].append(adapter)
    for name, trained in of_run.items():
        run, checkpoints, story = _run(name, sorted(trained, key=lambda each: each[0].step))
        made.runs.append(run)
        made.checkpoints += checkpoints
        made.stories[name] = story
    return made


class _Kind(Generic[M]):
    """The manifests of one kind of artifact."""

    def __init__(self, pattern: str, message_type: type[M]) -> None:
        self._pattern, self._type = pattern, message_type
        self.found: list[tuple[M, datetime]] = []

    def takes(self, one: Found, unreadable: list[str]) -> bool:
        """Whether the name is of this kind; the manifest is then kept, or its name when it cannot be read."""
        message = parsed(one.text, self._type, one.name, self._pattern, place=one.name, unreadable=unreadable)
        if message is not None:
            self.found.append((message, one.modified))
        return message is not None


def _snapshot(manifest: SnapshotManifest, at: datetime) -> Snapshot:
    return Snapshot(
        name=manifest.name,
        digest=manifest.digest,
        sources=manifest.sources,
        file_count=manifest.file_count,
        byte_count=manifest.byte_count,
        create_time=_stamp(at),
    )


def _sources(found: Sequence[tuple[SnapshotManifest, datetime]]) -> list[SnapshotSource]:
    newest: dict[str, tuple[SnapshotManifest, datetime]] = {}
    for manifest, at in found:
        project = names.project_of(manifest.name)
        if project not in newest or newest[project][1] < at:
            newest[project] = (manifest, at)
    return [source for _, (manifest, _) in sorted(newest.items()) for source in manifest.sources]


def _scan(manifest: VerdictsManifest, at: datetime, datasets: Sequence[tuple[DatasetManifest, datetime]]) -> Scan:
    """A scan ended well when the dataset of its verdicts is there."""
    scan = Scan(name=manifest.name, snapshot=manifest.snapshot, verdicts=manifest.name, status=new_status(at))
    advance(scan.status, JOB_STATE_RUNNING, at)
    made = _dataset_of(manifest, at, datasets)
    if made is None:
        scan.status.failure.reason = EmptyDataset.reason
        scan.status.failure.message = "rebuilt from its verdicts, of which no dataset is there"
        scan.status.failure.hint = "Scan the snapshot again."
        advance(scan.status, JOB_STATE_FAILED, at)
        return scan
    advance(scan.status, JOB_STATE_SUCCEEDED, at)
    scan.dataset = made.name
    json_format.ParseDict(json_format.MessageToDict(made.settings), scan.settings, ignore_unknown_fields=True)
    for reason, files in made.reasons.items():
        scan.report.reasons[reason].files = files
    scan.report.file_count = sum(made.reasons.values())
    scan.report.accepted_count = made.train.files + made.test.files
    scan.report.rejected_count = scan.report.file_count - scan.report.accepted_count
    for part, count in ((made.train, scan.report.train), (made.test, scan.report.test)):
        count.files, count.bytes, count.tokens = part.files, part.bytes, part.tokens
    scan.report.warnings.append("rebuilt from manifests: times, languages and losses of this report are lost")
    return scan


def _dataset_of(
    verdicts: VerdictsManifest, at: datetime, datasets: Sequence[tuple[DatasetManifest, datetime]]
) -> DatasetManifest | None:
    """The dataset that a scan's verdicts were made into. Manifests of older releases do not name it: it is then the one
    of the same snapshot that was stored next to them."""
    of_project = [
        (dataset, stored)
        for dataset, stored in datasets
        if names.project_of(dataset.name) == names.project_of(verdicts.name) and dataset.snapshot == verdicts.snapshot
    ]
    if verdicts.dataset:
        return next((dataset for dataset, _ in of_project if dataset.name == verdicts.dataset), None)
    return min(of_project, key=lambda each: abs(each[1] - at), default=(None, at))[0]


def _dataset(manifest: DatasetManifest, at: datetime, scans: Sequence[Scan]) -> Dataset:
    makers = [scan for scan in scans if scan.dataset == manifest.name]
    first = min(makers, key=lambda scan: scan.status.end_time.ToNanoseconds(), default=None)
    return Dataset(
        name=manifest.name,
        digest=manifest.digest,
        scan=first.name if first else "",
        snapshot=manifest.snapshot,
        model=manifest.model,
        train=manifest.train,
        test=manifest.test,
        create_time=_stamp(at),
    )


def _run(
    name: str, trained: Sequence[tuple[AdapterManifest, datetime]]
) -> tuple[Run, list[Checkpoint], list[RunEvent]]:
    """A run, its checkpoints and its story, of its adapters by step."""
    best = best_of([manifest for manifest, _ in trained])
    checkpoints = [_checkpoint(manifest, at, best=manifest is best) for manifest, at in trained]
    (last, ended), begun = trained[-1], trained[0][1]
    run = Run(
        name=name,
        dataset=last.dataset,
        base_model=last.base_model,
        status=new_status(begun),
        step=last.step,
        imported=not last.dataset and not last.HasField("hyperparameters"),
    )
    _end(run.status, begun, ended)
    if last.HasField("hyperparameters"):
        run.requested.CopyFrom(last.hyperparameters)
    for label in ("base_test_loss", "train_loss", "test_loss"):
        if last.HasField(label):
            setattr(run, label, getattr(last, label))
    story = [RunEvent(note=NOTE), *(RunEvent(checkpoint=one) for one in checkpoints)]
    if best is not None:
        run.best_checkpoint, run.best_test_loss = best.name, best.test_loss
        story.append(RunEvent(best=next(one for one in checkpoints if one.best)))
    for number, event in enumerate(story, 1):
        event.sequence = number
        event.time.CopyFrom(_stamp(ended))
    run.last_sequence = len(story)
    return run, checkpoints, story


def best_of(adapters: Sequence[AdapterManifest]) -> AdapterManifest | None:
    """The best of a run's adapters: the last that was marked so, which older releases did not do; there it is the one
    with the lowest test loss below the base model's."""
    marked = [one for one in adapters if one.best]
    if marked:
        return max(marked, key=lambda one: one.step)
    better = [
        one
        for one in adapters
        if one.HasField("test_loss") and one.HasField("base_test_loss") and one.test_loss < one.base_test_loss
    ]
    return min(better, key=lambda one: one.test_loss, default=None)


def _checkpoint(manifest: AdapterManifest, at: datetime, *, best: bool) -> Checkpoint:
    return Checkpoint(
        name=manifest.name,
        step=manifest.step,
        sha256=manifest.sha256,
        train_loss=manifest.train_loss if manifest.HasField("train_loss") else None,
        test_loss=manifest.test_loss if manifest.HasField("test_loss") else None,
        best=best,
        base_model=manifest.base_model,
        base_digest=manifest.base_digest,
        size=sum(file.size for file in manifest.files),
        strength=manifest.strength,
        create_time=_stamp(at),
    )


def _end(status: JobStatus, begun: datetime, ended: datetime) -> None:
    advance(status, JOB_STATE_RUNNING, begun)
    status.attempt = 1
    advance(status, JOB_STATE_SUCCEEDED, ended)


def _stamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp
