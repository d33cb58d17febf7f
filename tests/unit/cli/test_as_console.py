"""What one can click in the console one can type, too: every setting of a scan and a source, adapters in memory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from codegraft.common.v1.split_pb2 import Split
from codegraft.inference.v1 import serving_pb2
from codegraft.ingest.v1 import source_pb2
from codegraft.ingest.v1.snapshot_pb2 import GetSnapshotResponse, Snapshot, SnapshotSource
from codegraft.scanner.v1 import scan_pb2
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import GetDatasetResponse
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import GetCheckpointResponse, GetRunResponse, Run
from services.cli import scan
from services.core import errors

Codegraft = Callable[..., Any]
RUN = "projects/acme/runs/r-1"
SNAPSHOT = "projects/acme/snapshots/" + "a" * 64
GIT = source_pb2.GitSource(url="https://x/y.git", ref="main", credential="projects/acme/credentials/k")


def test_every_setting_of_a_scan_has_an_option() -> None:
    options = inspect.signature(scan.start).parameters
    singular = {"languages": "language", "languages_off": "language_off", "exclude_licenses": "exclude_license"}
    fields = scan_pb2.ScanSettings.DESCRIPTOR.fields_by_name
    assert [name for name in fields if singular.get(name, name) not in options] == []


@pytest.fixture
def source(fake: Any) -> Any:
    """One that is there, from git, with a rule of each kind."""
    rules = [source_pb2.SplitRule(pattern="a", split=Split.SPLIT_TEST), source_pb2.SplitRule(pattern="b", split=1)]
    stored = source_pb2.Source(name="projects/acme/sources/s", git=GIT, split_rules=rules, exclude=["x"])
    fake.answers["GetSource"] = source_pb2.GetSourceResponse(source=stored)
    fake.answers["UpdateSource"] = source_pb2.UpdateSourceResponse(source=stored)
    fake.answers["CreateSource"] = source_pb2.CreateSourceResponse(source=stored)
    return fake


def changed(fake: Any, codegraft: Codegraft, *options: str) -> source_pb2.Source:
    done = codegraft("source", "update", "s", "-p", "acme", "--no-wait", *options)
    assert done.code == 0, done.err
    found: source_pb2.Source = fake.last("UpdateSource").source
    return found


def test_a_source_changes_where_it_is_told_and_nowhere_else(source: Any, codegraft: Codegraft) -> None:
    sent = changed(source, codegraft, "--train", "c", "--train", "d", "--split", "test", "--gitattributes")
    assert [(rule.pattern, rule.split) for rule in sent.split_rules] == [("a", 2), ("c", 1), ("d", 1)]
    assert (sent.split, sent.honour_gitattributes, list(sent.exclude)) == (Split.SPLIT_TEST, True, ["x"])
    assert sent.WhichOneof("origin") is None, "an origin that is sent is fetched again"
    sent = changed(source, codegraft, "--test", "", "--exclude", "", "--no-gitattributes")
    assert [rule.pattern for rule in sent.split_rules] == ["b"] and not sent.exclude and not sent.honour_gitattributes
    sent = changed(source, codegraft, "--subpath", "src", "--submodules", "--credential", "")
    assert sent.git == source_pb2.GitSource(url="https://x/y.git", ref="main", subpath="src", submodules=True)


def test_a_source_is_added_with_all_that_a_form_has(source: Any, codegraft: Codegraft) -> None:
    options = ("--url", "https://x/y.zip", "--sha256", "a" * 64, "--train", "t", "--test", "u", "--gitattributes")
    assert codegraft("source", "add", "-p", "acme", "--no-wait", *options).code == 0
    sent = source.last("CreateSource").source
    assert (sent.url.sha256, sent.honour_gitattributes) == ("a" * 64, True)
    assert [(rule.pattern, rule.split) for rule in sent.split_rules] == [("u", 2), ("t", 1)]


def test_where_an_adapter_came_from(fake: Any, codegraft: Codegraft) -> None:
    commit = SnapshotSource(source="projects/acme/sources/s", commit="c0ffee" * 7, origin="https://x/y.git")
    status = serving_pb2.ServingStatus(active_checkpoint=f"{RUN}/checkpoints/2")
    fake.answers |= {
        "GetServing": serving_pb2.GetServingResponse(status=status),
        "GetCheckpoint": GetCheckpointResponse(checkpoint=Checkpoint(name=f"{RUN}/checkpoints/2")),
        "GetRun": GetRunResponse(run=Run(name=RUN, dataset="projects/acme/datasets/d")),
        "GetDataset": GetDatasetResponse(dataset=Dataset(name="projects/acme/datasets/d", snapshot=SNAPSHOT)),
        "GetSnapshot": GetSnapshotResponse(snapshot=Snapshot(name=SNAPSHOT, sources=[commit])),
    }
    told = codegraft("serve", "lineage", "-p", "acme").err
    for each in (f"{RUN}/checkpoints/2", RUN, "projects/acme/datasets/d", SNAPSHOT, "c0ffeec0ffee https://x/y.git"):
        assert each in told
    assert json.loads(codegraft("serve", "lineage", "-p", "acme", "r-1", "--json").out)["snapshot"]["name"] == SNAPSHOT
    fake.answers["GetDataset"] = errors.DatasetNotFound("gone")
    done = codegraft("serve", "lineage", "-p", "acme")
    assert done.code == 0 and RUN in done.err and "projects/acme/datasets/d is no more there" in done.err
    fake.answers["GetServing"] = serving_pb2.GetServingResponse()
    assert "the base model answers" in codegraft("serve", "lineage", "-p", "acme").err


def test_adapters_in_memory_are_listed_by_all_their_names(fake: Any, codegraft: Codegraft) -> None:
    first, second = f"{RUN}/checkpoints/1", f"{RUN}/checkpoints/2"
    held = serving_pb2.Adapter(checkpoint=first, checkpoints=[first, second], sha256="ab" * 32, projects=["projects/q"])
    fake.answers |= {
        "ListAdapters": serving_pb2.ListAdaptersResponse(adapters=[held]),
        "GetCheckpoint": GetCheckpointResponse(checkpoint=Checkpoint(name=second)),
        "LoadAdapter": serving_pb2.LoadAdapterResponse(adapter=held),
        "UnloadAdapter": serving_pb2.UnloadAdapterResponse(),
    }
    one, two = codegraft("serve", "adapters").out.splitlines()[1:]
    assert one.split() == ["acme", "r-1/1", "abababababab", "0", "0", "0", "q"]
    assert two.split() == ["acme", "r-1/2", "abababababab", "-", "-", "-", "-"]
    assert json.loads(codegraft("serve", "adapters", "--json").out)[0]["checkpoints"] == [first, second]
    assert codegraft("serve", "load", "-p", "acme", "r-1").code == 0
    assert fake.last("LoadAdapter").checkpoint == second, "the best one's own name"
    assert codegraft("serve", "unload", "-p", "acme", "r-1/2").code == 0
    assert fake.last("UnloadAdapter").checkpoint == second
