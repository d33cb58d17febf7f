"""What each service may do at the real NATS and the real object store: its own part, and nothing of the others'."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from minio import Minio
from minio.error import S3Error

from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.event.v1.events_pb2 import RunChanged
from services.cli.local import nats, permissions, ports, s3
from services.core import nats_connection
from services.core.audit.nats import NatsAudit
from services.core.auth.keyring import BUCKET
from services.core.errors import StateUnavailable, StoreUnavailable
from services.core.events.nats import NatsBus
from services.core.jobs.nats import NatsQueue
from services.core.nats_connection import NatsConnection
from services.core.quota.nats import NatsChannel
from services.core.state import Bounds
from services.core.state.nats import NatsState
from services.core.store.s3 import S3Address, S3Store
from tests.conftest import AT_ONCE

PASSWORDS = {name: f"password-of-{name}" for name in permissions.SERVICES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with every service as a user."""
    folder, port = tmp_path_factory.mktemp("nats"), ports.choose(["nats"], {})["nats"]
    child = nats.start(folder, log=folder / "log", port=port, user="admin", password="secret", services=PASSWORDS)
    yield f"nats://{ports.HOST}:{port}"
    child.stop(nats.GRACE)


@pytest.fixture
async def connections(server: str) -> Any:
    """One connection for each service."""
    opened = {name: await nats_connection.connect(server, user=name, password=word) for name, word in PASSWORDS.items()}
    yield opened
    for connection in opened.values():
        await connection.close()


def hasty(connection: NatsConnection) -> NatsConnection:
    """Gives up a request soon: the server drops what is not permitted, and answers nothing."""
    connection.js._timeout = 0.08
    return connection


async def test_a_service_does_all_that_it_does(connections: dict[str, NatsConnection]) -> None:
    for name, connection in connections.items():
        state = NatsState(connection, name)
        revision = await state.create("projects/p/things/t", b"1")
        revision = await state.update("projects/p/things/t", b"2", revision)
        assert [entry.value for entry in await state.list("projects/p")] == [b"2"]
        async with asyncio.timeout(5):
            async for entry in state.watch():
                assert entry.revision == revision
                break
        await state.delete("projects/p/things/t", revision)
        await NatsBus(connection, name).publish(f"codegraft.{name}.thing.made.v1", "s", RunChanged(), id=f"{name}-1")
        for bucket in permissions.SERVICES[name].buckets:
            bounded = NatsState(connection, bucket, Bounds(timedelta(days=30), 1 << 20))
            await bounded.update("projects/p/c", b"2", await bounded.create("projects/p/c", b"1"))
            config = (await connection.js.stream_info(f"KV_{bucket}")).config
            assert (config.max_age, config.max_bytes) == (30 * 86400, 1 << 20), "the server forgets by itself"
            assert [entry.value for entry in await bounded.list("projects/p")] == [b"2"]
            await bounded.delete("projects/p/c")
            with pytest.raises(StateUnavailable):
                for number in range(40):
                    await bounded.create(f"projects/p/{number}", b"x" * (64 << 10))
        queue = NatsQueue(connection)
        for kind in permissions.SERVICES[name].jobs:
            await queue.submit(kind, "projects/p/jobs/j")
            taken = await queue.take(kind, 5)
            assert taken is not None and taken.name == "projects/p/jobs/j"
            await taken.in_progress()
            await taken.dead_letter("enough")


async def test_keys_are_written_by_ingest_and_read_by_all(connections: dict[str, NatsConnection]) -> None:
    await NatsState(connections["ingest"], BUCKET).create("StoredKey/keys/k", b"key")
    for name, connection in connections.items():
        state = NatsState(connection, BUCKET)
        assert [entry.key for entry in await state.list("StoredKey")] == ["StoredKey/keys/k"]
        async with asyncio.timeout(5):
            async for entry in state.watch("StoredKey"):
                assert entry.value == b"key"
                break
        if name != "ingest":
            hasty(connection)
            for attempt in (state.create("StoredKey/keys/mine", b"x"), state.delete("StoredKey/keys/k")):
                with pytest.raises(StateUnavailable):
                    await attempt
    assert len(await NatsState(connections["ingest"], BUCKET).list("StoredKey")) == 1


async def test_room_is_claimed_by_who_stores_for_projects(connections: dict[str, NatsConnection]) -> None:
    for name, connection in connections.items():
        state = NatsState(connection, BUCKET)
        key = f"StoredPlaces/projects/{name}/storage_bytes"
        if permissions.SERVICES[name].writes_objects:
            await state.update(key, b"2", await state.create(key, b"1"))
        else:
            hasty(connection)
            with pytest.raises(StateUnavailable):
                await state.create(key, b"1")


async def test_events_are_read_by_all_and_published_by_their_own(
    connections: dict[str, NatsConnection], server: str
) -> None:
    async def publish(connection: NatsConnection, id: str) -> None:
        await NatsBus(connection, "x").publish("codegraft.trainer.run.changed.v1", "projects/p", RunChanged(), id=id)

    listening = aiter(NatsBus(connections["inference"], "inference").subscribe("codegraft.trainer.run.changed.v1"))
    heard = asyncio.ensure_future(anext(listening))
    async with asyncio.timeout(20):
        for number in itertools.count():
            await publish(connections["trainer"], f"early-{number}")
            if (await asyncio.wait([heard], timeout=0.1))[0]:
                break
    forger = await nats_connection.connect(server, user="inference", password=PASSWORDS["inference"])
    with pytest.raises(StateUnavailable):
        await publish(hasty(forger), "forged")
    await forger.close()
    await publish(connections["trainer"], "true")
    event = await heard
    async with asyncio.timeout(20):
        while event.id.startswith("early"):
            event = await anext(listening)
    assert event.id == "true"
    await listening.aclose()  # type: ignore[attr-defined]


async def test_the_audit_log_is_written_by_all_and_read_by_ingest(connections: dict[str, NatsConnection]) -> None:
    for name, connection in connections.items():
        await NatsAudit(connection, name).append(AuditRecord(method=f"/{name}", project="projects/p"))
    found, _ = await NatsAudit(connections["ingest"], "ingest").page("projects/p", 0, "")
    assert [record.method for record in found] == [f"/{name}" for name in connections]
    for name in connections.keys() - {"ingest"}:
        mine = hasty(connections[name])
        with pytest.raises(StateUnavailable):
            await NatsAudit(mine, name).page("projects/p", 0, "")
        with pytest.raises(StateUnavailable):
            await NatsAudit(mine, "ingest").append(AuditRecord())


async def test_usage_of_quotas_is_told_by_each_for_itself_and_heard_by_all(
    connections: dict[str, NatsConnection],
) -> None:
    heard: dict[str, list[bytes]] = {name: [] for name in connections}
    async with contextlib.AsyncExitStack() as stack:
        for name, connection in connections.items():
            await stack.enter_async_context(NatsChannel(connection, name).listen(heard[name].append, lambda: None))
            for _ in range(2):  # the client's first PING overtakes what waits to be sent
                await connection.client.flush()
        for name, connection in connections.items():
            for other in permissions.SERVICES.keys() - {name}:
                await NatsChannel(connection, other).send(f"{name} for {other}".encode())
            await NatsChannel(connection, name).send(name.encode())
        async with asyncio.timeout(5):
            while not all(len(words) >= len(connections) for words in heard.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
    assert all(sorted(words) == sorted(name.encode() for name in connections) for words in heard.values())


@pytest.mark.parametrize("name", permissions.SERVICES)
async def test_no_service_reaches_into_another(connections: dict[str, NatsConnection], name: str) -> None:
    mine = hasty(connections[name])
    for other in permissions.SERVICES.keys() - {name}:
        await NatsState(connections[other], other).list()  # makes the bucket
        for bucket in (other, *permissions.SERVICES[other].buckets):
            state = NatsState(mine, bucket)
            for attempt in (state.create("projects/p/x", b"x"), state.list()):
                with pytest.raises(StateUnavailable):
                    await attempt
        for kind in permissions.SERVICES[other].jobs:
            for attempt in (NatsQueue(mine).submit(kind, "projects/p/j"), NatsQueue(mine).take(kind, 0.2)):
                with pytest.raises(StateUnavailable):
                    await attempt
        for request in (f"STREAM.DELETE.KV_{other}", f"STREAM.PURGE.KV_{other}", f"STREAM.UPDATE.KV_{other}"):
            with pytest.raises(TimeoutError):
                await mine.client.request(f"$JS.API.{request}", b"{}", timeout=0.1)
    heard: list[Any] = []

    async def hear(message: Any) -> None:
        heard.append(message)

    for subject in (">", "_INBOX.>", "$KV.>", "$JS.API.>"):
        await mine.client.subscribe(subject, cb=hear)
    other = "trainer" if name != "trainer" else "ingest"
    await NatsState(connections[other], other).list()
    await asyncio.sleep(0.1)
    assert heard == []


def test_a_wrong_password_does_not_come_in(server: str) -> None:
    with pytest.raises(StateUnavailable):
        asyncio.run(
            nats_connection.connect(server, user="ingest", password=PASSWORDS["trainer"], patience=timedelta(seconds=2))
        )


def test_the_object_store_lets_each_service_do_its_own(tmp_path: Path) -> None:
    keys = {name: (f"ACCESS{number:014d}", f"secret-of-{name}") for number, name in enumerate(permissions.SERVICES)}
    port = ports.choose(["s3"], {})["s3"]
    server = s3.start(
        tmp_path / "data", log=tmp_path / "log", port=port, access_key="A" * 20, secret_key="b" * 40, services=keys
    )
    try:
        endpoint = f"{ports.HOST}:{port}"
        assert (tmp_path / "data" / s3.IDENTITIES).stat().st_mode & 0o777 == 0o600
        for name, (access, secret) in keys.items():
            asyncio.run(_start_as_a_service(S3Address(endpoint, "codegraft", access, secret)))
            client = Minio(endpoint, access_key=access, secret_key=secret, secure=False)
            attempts: list[Any] = [
                lambda client=client: client.put_object("codegraft", "blobs/x", io.BytesIO(b"x"), 1),
                lambda client=client: client.remove_object("codegraft", "blobs/x"),
            ]
            for attempt in attempts:
                if permissions.SERVICES[name].writes_objects:
                    attempt()
                else:
                    with pytest.raises(S3Error, match="AccessDenied"):
                        attempt()
            with pytest.raises(S3Error, match="AccessDenied"):
                client.make_bucket("another")
        with pytest.raises(StoreUnavailable):
            asyncio.run(_start_as_a_service(S3Address(endpoint, "codegraft", keys["ingest"][0], "wrong")))
    finally:
        server.stop(AT_ONCE)


async def _start_as_a_service(address: S3Address) -> None:
    store = S3Store(address)
    try:
        await store.prepare()
        await store.check()
        assert [key async for key in store.list("blobs/")] == []
    finally:
        store.close()
