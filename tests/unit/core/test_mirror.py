"""Copies of records in the store: they follow, they are made up for, and they outlive what was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf import json_format

from codegraft.inference.v1.serving_pb2 import SERVING_MODE_LATEST_BEST, SERVING_MODE_PINNED, Serving
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import SOURCE_STATE_FETCHING, GitSource, Source
from services.core.backoff import Backoff
from services.core.errors import NotFound, StoreUnavailable
from services.core.state import MemoryState, Table
from services.core.state import mirror as mirrors
from services.core.state.mirror import GONE, Mirror
from services.core.store import MemoryStore
from services.inference import copies as of_policies
from services.ingest import copies, records

PROJECT, SOURCE, POLICY = "projects/p", "projects/p/sources/s", "projects/p/serving"
SOURCE_KEY = f"records/ingest/Source/{SOURCE}.json"
PROJECT_KEY = f"records/ingest/Project/{PROJECT}.json"
POLICY_KEY = f"records/inference/Serving/{POLICY}.json"


class Store(MemoryStore):
    """Can be away, can be slow, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = asyncio.Event()
        self.writes = 0

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if self.away:
            raise StoreUnavailable("away")
        self.waiting.set()
        await self.open.wait()
        self.writes += 1
        return await super().put(key, data, if_absent=if_absent)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def tables() -> records.Tables:
    return records.Tables.of(MemoryState())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_WAITS", Backoff(timedelta(milliseconds=1), timedelta(milliseconds=5)))


@asynccontextmanager
async def running(*some: Mirror[Any]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one.run()) for one in some]
    try:
        yield
        await asyncio.sleep(0.02)  # time for what must not happen
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(true: Any) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def source(store: Store) -> Source:
    return json_format.Parse(store.data[SOURCE_KEY], Source())


async def test_a_copy_follows_its_record_to_the_end(tables: records.Tables, store: Store) -> None:
    async with running(*copies.mirrors(tables, store)):
        await tables.projects.create(Project(name=PROJECT, title="Acme"))
        await tables.sources.create(Source(name=SOURCE, git=GitSource(url="https://git.example/a"), generation=1))
        await until(lambda: len(store.data) == 2)
        assert source(store) == Source(name=SOURCE, git=GitSource(url="https://git.example/a"))
        await tables.sources.mutate(SOURCE, lambda record: setattr(record, "content_digest", "d"))
        await until(lambda: source(store).content_digest == "d")

        written = store.writes
        for _ in range(3):  # how a fetch goes is nobody's business tomorrow
            await tables.sources.mutate(SOURCE, lambda record: setattr(record, "state", SOURCE_STATE_FETCHING))
            await tables.sources.mutate(SOURCE, lambda record: record.lease_expire_time.GetCurrentTime())
        await asyncio.sleep(0.02)
        assert store.writes == written

        await tables.projects.delete(PROJECT)
        await tables.sources.delete(SOURCE)
        await until(lambda: store.data == {PROJECT_KEY: GONE})
        await tables.projects.create(Project(name=PROJECT, title="anew"))
        await until(lambda: b"anew" in store.data[PROJECT_KEY])


async def test_what_a_killed_process_left_out_is_made_up_for(tables: records.Tables, store: Store) -> None:
    for number in (1, 2, 3):
        await tables.sources.create(Source(name=f"{SOURCE}{number}", commit="new"))
    store.data[SOURCE_KEY.replace("s.json", "s1.json")] = b'{"name": "old"}'
    store.data[SOURCE_KEY.replace("s.json", "s3.json")] = b'{"name": "removed meanwhile"}'
    await tables.sources.delete(f"{SOURCE}3")
    async with running(*copies.mirrors(tables, store)):
        await until(lambda: len(store.data) == 2 and all(b"new" in text for text in store.data.values()))
    written = store.writes
    async with running(*copies.mirrors(tables, store)):
        pass
    assert store.writes == written, "what is right is not written again"


async def test_what_nats_has_lost_is_not_taken_for_deleted(tables: records.Tables, store: Store) -> None:
    await tables.projects.create(Project(name=PROJECT))
    await tables.sources.create(Source(name=SOURCE))
    async with running(*copies.mirrors(tables, store)):
        await until(lambda: len(store.data) == 2)
    before = dict(store.data)
    empty = records.Tables.of(MemoryState())
    async with running(*copies.mirrors(empty, store)):
        await empty.sources.create(Source(name=f"{SOURCE}-other"))
        await until(lambda: len(store.data) == 3)
    assert before.items() <= store.data.items()


async def test_what_is_lost_just_before_it_is_copied_keeps_its_copy(store: Store) -> None:
    state = MemoryState()
    tables = records.Tables.of(state)
    await tables.sources.create(Source(name=SOURCE, commit="new"))
    store.data[SOURCE_KEY], store.away = b'{"name": "what is left of it"}', True
    async with running(*copies.mirrors(tables, store)):
        await asyncio.sleep(0.02)
        state._entries.clear()
        await asyncio.sleep(0.02)  # a copy that read the record before still fails
        store.away = False
    assert b"what is left" in store.data[SOURCE_KEY]


async def test_no_change_is_lost_while_the_store_is_away(tables: records.Tables, store: Store) -> None:
    store.away = True
    async with running(*copies.mirrors(tables, store)):
        for number in range(3):
            await tables.sources.create(Source(name=f"{SOURCE}{number}"))
        await tables.sources.delete(f"{SOURCE}1")
        await asyncio.sleep(0.02)
        assert not store.data
        store.away = False
        await until(lambda: len(store.data) == 2)


@pytest.mark.parametrize("end", ["changed", "changed back", "deleted"])
async def test_a_slow_replica_does_not_bring_back_what_was(tables: records.Tables, store: Store, end: str) -> None:
    def commit(text: str) -> Callable[[Source], None]:
        return lambda record: setattr(record, "commit", text)

    slow = Store()
    slow.data = store.data
    await tables.sources.create(Source(name=SOURCE, commit="first"))
    async with running(*copies.mirrors(tables, slow)):
        await until(lambda: SOURCE_KEY in store.data)
        slow.open.clear()
        slow.waiting.clear()
        await tables.sources.mutate(SOURCE, commit("second"))
        await slow.waiting.wait()
        async with running(*copies.mirrors(tables, store)):
            await until(lambda: source(store).commit == "second")
            if end != "deleted":
                after = "third" if end == "changed" else "first"
                await tables.sources.mutate(SOURCE, commit(after))
                await until(lambda: source(store).commit == after)
            else:
                await tables.sources.delete(SOURCE)
                await until(lambda: SOURCE_KEY not in store.data)
        written = slow.writes
        slow.open.set()
        await until(lambda: slow.writes > written)
    assert not store.data if end == "deleted" else source(store).commit == after


async def test_a_policy_that_came_by_itself_leaves_a_persons_word_in_place(store: Store) -> None:
    def table() -> Table[Serving]:
        return Table(MemoryState(), Serving, missing=NotFound)

    def copied() -> Serving:
        return json_format.Parse(store.data[POLICY_KEY], Serving())

    first, second = table(), table()
    async with running(of_policies.mirror(first, store)):
        await first.create(Serving(name=POLICY, mode=SERVING_MODE_LATEST_BEST, wanted_checkpoint="a"))
        await until(lambda: POLICY_KEY in store.data)
        await first.mutate(POLICY, lambda policy: setattr(policy, "mode", SERVING_MODE_PINNED))
        await until(lambda: copied().mode == SERVING_MODE_PINNED)
    async with running(of_policies.mirror(second, store)):  # NATS has lost the first one, and somebody completes
        await second.create(Serving(name=POLICY, mode=SERVING_MODE_LATEST_BEST, wanted_checkpoint="b"))
        await second.mutate(POLICY, lambda policy: setattr(policy, "wanted_checkpoint", "c"))
        await asyncio.sleep(0.02)
        assert copied().mode == SERVING_MODE_PINNED
        await second.mutate(POLICY, lambda policy: setattr(policy, "decided", True))
        await until(lambda: copied().wanted_checkpoint == "c")


def test_every_field_is_copied_or_left_out_on_purpose() -> None:
    """A field that is new has to be thought about: does a rebuilt record need it, and may everybody who reads the store
    read it?"""
    of_the_moment = {
        Project: {"etag"},
        Source: {
            "etag", "state", "failure", "progress", "sync_time", "attempt_time", "generation", "fetched_generation",
            "stored_bytes", "snapshot", "fetcher", "lease_expire_time",
        },
        Serving: {"etag"},
    }  # fmt: skip
    copied = {Project: copies.PROJECT_FIELDS, Source: copies.SOURCE_FIELDS, Serving: of_policies.FIELDS}
    for kind, left_out in of_the_moment.items():
        assert {field.name for field in kind.DESCRIPTOR.fields} == {*copied[kind], *left_out}
        assert not left_out & {*copied[kind]}
