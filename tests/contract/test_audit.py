"""The audit log: one suite for the fake and the stream, and what the calls of a real service leave in it."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nats.js.errors
import pytest

from codegraft.access.v1.access_pb2 import ROLE_OPERATOR, ROLE_READER
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.ingest.v1.project_pb2 import CreateProjectRequest, Project
from services.cli.output import plain
from services.client import AsyncCodegraft
from services.core import errors
from services.core.audit.calls import Audit
from services.core.audit.log import AuditLog, MemoryAudit
from services.core.audit.nats import STREAM, NatsAudit
from services.core.audit.record import MOST_BYTES, Change, fill
from services.core.auth import policy
from services.core.auth.caller import Caller, Role
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.nats_connection import connect
from services.core.runtime import Runtime
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.keys import Seed
from tests.rpcs import METHODS
from tests.servers.ingest import KEY, serving


@pytest.fixture(params=["memory", "nats"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[AuditLog]:
    if request.param == "memory":
        yield MemoryAudit()
        return
    server = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield NatsAudit(connection, "ingest")
    await connection.close()


def record(project: str, method: str = "/m") -> AuditRecord:
    made = AuditRecord(method=method, caller="keys/k", project=project and f"projects/{project}")
    made.time.GetCurrentTime()
    return made


async def test_records_come_back_in_order_by_project_and_page(log: AuditLog) -> None:
    mine, other = uuid.uuid4().hex[:8], uuid.uuid4().hex[:8]
    for number in range(7):
        await log.append(record(mine, f"/{number}"))
        await log.append(record(other))
    await log.append(record(""))
    seen, token = [], ""
    while True:
        page, token = await log.page(f"projects/{mine}", 3, token)
        seen += page
        if not token:
            break
    assert [each.method for each in seen] == [f"/{number}" for number in range(7)]
    assert all(a.sequence < b.sequence for a, b in itertools.pairwise(seen))
    everything, _ = await log.page("", 1000, "")
    assert {f"projects/{mine}", f"projects/{other}", ""} <= {each.project for each in everything}
    assert await log.page("projects/nobody", 0, "") == ([], "")
    with pytest.raises(errors.InvalidPageSize):
        await log.page("", -1, "")
    with pytest.raises(errors.InvalidPageToken):
        await log.page("", 0, (await log.page(f"projects/{mine}", 3, ""))[1])


async def test_what_is_older_is_left_out(log: AuditLog) -> None:
    project = uuid.uuid4().hex[:8]
    await log.append(record(project, "/old"))
    await asyncio.sleep(0.02)
    since = datetime.now(UTC)
    await asyncio.sleep(0.02)
    for number in range(3):
        await log.append(record(project, f"/{number}"))
    first, token = await log.page(f"projects/{project}", 2, "", since)
    rest, end = await log.page(f"projects/{project}", 2, token, since)
    assert [each.method for each in (*first, *rest)] == ["/0", "/1", "/2"] and not end
    assert (await log.page(f"projects/{project}", 2, "", since + timedelta(hours=1)))[0] == []


@pytest.mark.parametrize("project", ["x" * 70_000, "a b", "p\r\nPUB x 1", "*", ">", "é", "p.q"])
async def test_a_call_that_names_no_project_is_recorded_as_nobodys(nats_server: Any, project: str) -> None:
    """Anybody who is known may send such a name, and is recorded: it must not become part of a subject."""
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    log = NatsAudit(connection, "ingest")
    method = "/codegraft.ingest.v1.ProjectService/CreateProject"
    entry = Audit(log).entry(method)
    entry.identified(Caller(f"keys/{uuid.uuid4().hex}", Role.READER, None))
    entry.requested(CreateProjectRequest(project_id=project))
    await entry.end("PERMISSION_DENIED", "PERMISSION_DENIED", "r")
    found, token = await log.page("", 1000, "")
    while token:
        page, token = await log.page("", 1000, token)
        found += page
    assert found and (found[-1].caller, found[-1].project) == (entry._record.caller, "")
    assert found[-1].resources == [f"projects/{project}"[:300]]
    await connection.close()


async def test_nobody_deletes_a_record(nats_server: Any) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    await NatsAudit(connection, "ingest").append(record("p"))
    last = (await connection.js.stream_info(STREAM)).state.last_seq
    for attempt in (connection.js.delete_msg(STREAM, last), connection.js.purge_stream(STREAM)):
        with pytest.raises(nats.js.errors.APIError):
            await attempt
    await connection.close()


def test_large_changes_go_without_contents() -> None:
    large = Project(name="projects/p", title="x" * MOST_BYTES)
    made = fill(AuditRecord(), [Change("projects/p", None, large)])
    assert made.shortened and made.ByteSize() < 1000 and made.changes[0].name == "projects/p"


def test_what_changes_something_is_known_by_its_name() -> None:
    reading = {method.rpartition("/")[2] for method in METHODS if not policy.changes(method)}
    assert reading == {
        "Check", "Watch", "List", "ServerReflectionInfo", "GetCaller", "ListKeys", "ListAuditRecords",
        "GetProject", "ListProjects", "GetSource", "ListSources", "WatchSource", "WatchSources", "GetUpload",
        "GetSnapshot", "ListSnapshots", "ListSnapshotFiles", "DiffSnapshots", "GetCredential", "ListCredentials",
        "GetScan", "ListScans", "WatchScan", "WatchScans", "ListVerdicts", "GetDataset", "ListDatasets",
        "PlanRun", "GetRun", "ListRuns", "WatchRun", "WatchRuns", "ListCheckpoints", "GetCheckpoint",
        "GetBestCheckpoint",
        "DownloadCheckpoint", "ListModels", "GetModel", "Complete", "Chat", "Score",
        "GetQuota", "GetUsage", "GetServing", "WatchServing", "ListAdapters", "ListWorkers", "GetAcceptance",
        "ListKeptCompletions",
        "RecordFeedback",  # one a suggestion: they are counted, not audited
    }  # fmt: skip


# --- the calls of a service -------------------------------------------------------------------------------------


@pytest.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[tuple[AsyncCodegraft, MemoryAudit]]:
    """A real ingest service with authentication and an audit log, and its operator's client."""
    runtime, root = Runtime.memory(tmp_path / "cache"), ApiKey.new("root").text
    settings = IngestSettings(cache_dir=tmp_path / "cache", ingest_credential_keys=(KEY,))  # type: ignore[arg-type]
    parts = Ingest(runtime, settings)
    await parts.keys.seed([Seed(key=root, role="operator")])  # type: ignore[arg-type]
    gate = Gate(Keyring(runtime.state(BUCKET)))
    following = asyncio.create_task(gate.run())
    assert isinstance(runtime.audit, MemoryAudit)
    async with serving(parts, gate, runtime.audit) as client:
        yield client.with_key(root), runtime.audit
    following.cancel()


async def test_a_change_is_recorded_with_before_and_after(ingest: tuple[AsyncCodegraft, MemoryAudit]) -> None:
    client, log = ingest
    project = await client.projects.create("a", title="one")
    project.title = "two"
    await client.projects.update(project)
    await client.projects.get("a")
    assert [each async for each in client.projects.list()]
    await client.projects.delete("a")
    created, updated, deleted = log.records
    assert [each.method[-13:] for each in log.records] == ["CreateProject", "UpdateProject", "DeleteProject"]
    for each in log.records:
        assert (each.caller, each.project, each.service, each.code) == ("keys/root", "projects/a", "ingest", "OK")
        assert each.request_id and abs(each.time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1)
    [change] = updated.changes
    assert (change.name, change.before["title"], change.after["title"]) == ("projects/a", "one", "two")
    assert not created.changes[0].HasField("before") and created.changes[0].after["title"] == "one"
    assert not deleted.changes[0].HasField("after") and deleted.changes[0].before["title"] == "two"
    listed = [each async for each in client.audit.list("a", page_size=2)]
    assert listed == log.records
    assert [each async for each in client.audit.list()] == log.records


async def test_a_new_project_does_not_read_what_was_done_to_the_one_before(
    ingest: tuple[AsyncCodegraft, MemoryAudit],
) -> None:
    client, log = ingest
    await client.projects.create("a", title="before")
    await client.projects.delete("a")
    await client.projects.create("a", title="after")
    theirs = client.with_key((await client.keys.create(ROLE_OPERATOR, projects=["a"], key_id="theirs"))[1])
    seen = [each async for each in theirs.audit.list("a")]
    assert [each.method.rpartition("/")[2] for each in seen] == ["CreateProject", "CreateKey"], seen
    assert seen[0].changes[0].after["title"] == "after"
    assert [each async for each in client.audit.list("a")] == log.records, "who is of all projects reads on"


async def test_denied_and_failed_calls_are_recorded_and_strangers_are_not(
    ingest: tuple[AsyncCodegraft, MemoryAudit],
) -> None:
    client, log = ingest
    await client.projects.create("a")
    reader = client.with_key((await client.keys.create(ROLE_READER, projects=["a"], key_id="reader"))[1])
    theirs = client.with_key((await client.keys.create(ROLE_OPERATOR, projects=["b"], key_id="theirs"))[1])
    log.records.clear()
    for attempt in (
        reader.projects.delete("a"),
        theirs.sources.upload("a", b"x"),
        client.projects.create("a"),
        client.with_key("nonsense").projects.delete("a"),
        theirs.projects.get("a"),
    ):
        with pytest.raises(errors.CodegraftError):
            await attempt
    assert [(each.caller, each.code, each.reason, each.project) for each in log.records] == [
        ("keys/reader", "PERMISSION_DENIED", "PERMISSION_DENIED", "projects/a"),
        ("keys/root", "ALREADY_EXISTS", "RESOURCE_EXISTS", "projects/a"),
    ]
    with pytest.raises(errors.PermissionDenied):
        await anext(aiter(theirs.audit.list("a")))
    with pytest.raises(errors.PermissionDenied):
        await anext(aiter(theirs.audit.list()))
    with pytest.raises(errors.InvalidName):
        await anext(aiter(client.audit.list("projects/a/runs/r")))


async def test_no_secret_is_in_the_log(ingest: tuple[AsyncCodegraft, MemoryAudit]) -> None:
    client, log = ingest
    await client.projects.create("a")
    await client.credentials.create_token("a", "hush-hush-token", username="me", credential_id="hub")
    _, secret = await client.keys.create(ROLE_READER, projects=["a"], key_id="k")
    _, other = await client.keys.rotate("k")
    text = "".join(str(each) for each in log.records)
    assert "projects/a/credentials/hub" in text and "keys/k" in text
    for word in ("hush-hush", "sealed", "sha256", secret.split("_", 2)[2], other.split("_", 2)[2]):
        assert word not in text, word


async def test_uploads_are_recorded_with_their_project(ingest: tuple[AsyncCodegraft, MemoryAudit]) -> None:
    client, log = ingest
    await client.projects.create("a")
    await client.sources.upload("a", b"content")
    assert (log.records[-1].method.rpartition("/")[2], log.records[-1].project) == ("UploadContent", "projects/a")
    assert log.records[-1].code == "OK" and log.records[-1].changes


async def test_a_log_that_is_away_keeps_no_change_from_happening(
    ingest: tuple[AsyncCodegraft, MemoryAudit], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = ingest

    async def fail(self: MemoryAudit, record: AuditRecord) -> None:
        raise errors.StateUnavailable("away")

    monkeypatch.setattr(MemoryAudit, "append", fail)
    assert (await client.projects.create("a")).name == "projects/a"


def test_json_of_a_record_is_plain() -> None:
    made = fill(AuditRecord(), [Change("projects/p", None, Project(name="projects/p", title="t"))])
    assert json.loads(json.dumps(plain(made)))["changes"][0]["after"] == {"name": "projects/p", "title": "t"}
