"""Room for storage over services, with the real NATS between them: of one project's last bytes nobody gets two."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from codegraft.access.v1.quota_pb2 import StoredPlaces
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.audit.log import MemoryAudit
from services.core.auth.keyring import BUCKET
from services.core.errors import QuotaExceeded
from services.core.events import MemoryBus
from services.core.jobs import MemoryQueue
from services.core.nats_connection import connect
from services.core.quota.limits import Defaults
from services.core.runtime import Runtime
from services.core.state import StateStore
from services.core.state.nats import NatsState
from services.core.store import MemoryStore
from services.ingest import records, storage
from services.ingest.records import Tables
from tests.conftest import NatsServer

LIMIT = 1000


@pytest.fixture
def project() -> str:
    """One that no other test knows."""
    return f"projects/{uuid.uuid4().hex[:8]}"


class House:
    """Ingest, scanner and trainer as far as they store: each with a connection of its own, over one object store."""

    def __init__(self, states: list[dict[str, StateStore]], cache: Path) -> None:
        async def check() -> None:
            return None

        store = MemoryStore()
        self.ingest_runtime, self.scanner, self.trainer = (
            Runtime(
                state=lambda bucket, _, state=state: state[bucket],  # type: ignore[misc]
                jobs=MemoryQueue(),
                events=MemoryBus(),
                audit=MemoryAudit(),
                store=store,
                cache_dir=cache,
                check=check,
                quota_project=Defaults(storage_bytes=LIMIT),
            )
            for state in states
        )
        self.tables = Tables.of(self.ingest_runtime.state(records.BUCKET))
        self.ingest = storage.Storage(self.ingest_runtime, self.tables)
        self.let_in = 0

    async def upload(self, project: str, name: str, size: int) -> bool:
        """Stores as ingest does; whether there was room."""
        try:
            async with self.ingest.places.claim([project], f"{project}/uploads/{name}", size):
                self._came(size)
                await asyncio.sleep(0.01)
                await self.tables.uploads.create(Upload(name=f"{project}/uploads/{name}", size=size))
        except QuotaExceeded:
            return False
        return True

    async def commit(self, service: Runtime, project: str, name: str, size: int) -> bool:
        """Stores an artifact as scanner and trainer do; whether there was room."""
        try:
            async with service.storage.claim([project], f"{project}/{name}", size):
                self._came(size)
                await asyncio.sleep(0.01)
                manifest = AdapterManifest(name=f"{project}/{name}")
                await service.artifacts.commit(f"{project}/{name}", manifest, {"one": uuid.uuid4().bytes[:1] * size})
        except QuotaExceeded:
            return False
        return True

    def _came(self, size: int) -> None:
        self.let_in += size
        assert self.let_in <= LIMIT, "two were let into one room"


@pytest.fixture
async def house(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[House]:
    login = {"user": nats_server.user, "password": nats_server.password}
    connections = [await connect(nats_server.url, **login) for _ in range(3)]  # type: ignore[arg-type]
    own = ("ingest", "scanner", "trainer")
    states = [
        {bucket: NatsState(connection, bucket) for bucket in (BUCKET, *own, "memory")} for connection in connections
    ]
    yield House(states, tmp_path)  # type: ignore[arg-type]
    for connection in connections:
        await connection.close()


async def test_of_services_at_the_same_moment_as_many_store_as_there_is_room(house: House, project: str) -> None:
    """Ten pieces fit; more than twice as many come at once, to three services."""
    pieces = []
    for number in range(8):
        pieces += [
            house.upload(project, f"u{number}", 100),
            house.commit(house.scanner, project, f"datasets/d{number}", 100),
            house.commit(house.trainer, project, f"runs/r/checkpoints/{number}", 100),
        ]
    passed = await asyncio.gather(*pieces)
    assert sum(passed) == 10 and house.let_in == LIMIT
    used = [await each.used(project) for each in (house.ingest.places, house.scanner.storage, house.trainer.storage)]
    assert used == [LIMIT] * 3, "nobody waits to know what the others have stored"


async def test_what_one_service_stored_the_others_know_at_once(house: House, project: str) -> None:
    """One after the other without a pause, and to the last byte: nothing is missed, and nothing counts twice."""
    assert await house.upload(project, "u1", 300)
    assert await house.commit(house.trainer, project, "runs/r/checkpoints/8", 300)
    assert not await house.upload(project, "u2", 401)
    assert await house.upload(project, "u2", 250)
    assert await house.commit(house.scanner, project, "datasets/d", 50), "ingest's count of artifacts is seconds old"
    assert not await house.upload(project, "u3", 101)
    assert not await house.commit(house.trainer, project, "runs/r/checkpoints/9", 101)
    assert await house.upload(project, "u3", 100)


async def test_what_grows_is_not_counted_twice_while_it_does(house: House, project: str) -> None:
    source = f"{project}/sources/s"
    async with house.ingest.places.claim([project], source, 400):
        await house.tables.sources.create(Source(name=source, byte_count=400))
    async with house.ingest.places.claim([project], source, 600):
        assert not await house.commit(house.trainer, project, "runs/r/checkpoints/8", 401)
        assert await house.commit(house.trainer, project, "runs/r/checkpoints/8", 400)
        await house.tables.sources.mutate(source, lambda it: setattr(it, "byte_count", 600))
        await house.ingest.places.settle(project)  # what another replica tells meanwhile
        assert await house.trainer.storage.used(project) == LIMIT
        with pytest.raises(QuotaExceeded) as told:
            async with house.trainer.storage.claim([project], f"{project}/runs/r/checkpoints/9", 1):
                raise AssertionError
        assert told.value.metadata["used"] == str(LIMIT)


async def test_a_killed_process_keeps_its_room_only_for_a_moment(
    house: House, nats_server: NatsServer, project: str
) -> None:
    """While it lives, its claim outlasts the time after which it would be void."""
    lasts = 1.5
    state = house.ingest_runtime.state(BUCKET)

    async def there_now() -> StoredPlaces:
        entry = await state.get(f"StoredPlaces/{project}/storage_bytes")
        assert entry is not None and entry.value is not None
        return StoredPlaces.FromString(entry.value)

    async def ends() -> int:
        [place] = (await there_now()).places
        return place.expire_time.ToNanoseconds()

    said = (nats_server.url, nats_server.user, nats_server.password, project, "700", str(LIMIT), str(lasts))
    there = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.contract.claim_process", *said, stdout=asyncio.subprocess.PIPE
    )
    assert there.stdout is not None and await there.stdout.readline() == b"holds\n"
    try:
        first = await ends()
        assert not await house.upload(project, "u", 301)
        async with asyncio.timeout(20):
            while await ends() == first:  # noqa: ASYNC110  # another process's
                await asyncio.sleep(0.02)
        assert not await house.upload(project, "u", 301)
        assert await house.upload(project, "small", 300)
    finally:
        there.kill()
        await there.wait()
    house.let_in = 0
    void = await ends()
    async with asyncio.timeout(20):
        while not await house.upload(project, "u", 700):  # noqa: ASYNC110  # nobody tells that a claim is void
            await asyncio.sleep(0.02)
    assert time.time_ns() >= void
    after = await there_now()
    assert not after.places and after.recorded.uploads == LIMIT
