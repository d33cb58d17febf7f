"""What API keys may do in a project, and its quota, go when it is deleted, and are nothing of the next of its name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from codegraft.access.v1.access_pb2 import ROLE_CONTRIBUTOR, ROLE_OPERATOR, ROLE_READER
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.access.v1.quota_pb2 import Limits
from services.client import AsyncCodegraft
from services.core import errors
from services.core.audit.log import MemoryAudit
from services.core.auth.caller import Caller, Role, set_current
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.quota.limits import Kind
from services.core.runtime import Runtime
from services.ingest import deletions
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.grants import Grants
from services.ingest.keys import Seed
from tests.servers.ingest import serving, until


class House:
    """An ingest process with keys, quotas and an audit log; the projects p and q."""

    def __init__(self, runtime: Runtime, settings: IngestSettings, parts: Ingest, client: AsyncCodegraft) -> None:
        assert isinstance(runtime.audit, MemoryAudit)
        self.runtime, self.settings, self.parts, self.client = runtime, settings, parts, client
        self.records = runtime.audit.records

    async def key(self, id: str, role: Any, *projects: str) -> AsyncCodegraft:
        return self.client.with_key((await self.client.keys.create(role, projects=projects, key_id=id))[1])

    async def states(self) -> dict[str, tuple[list[str], bool]]:
        """Of each key its projects, and whether it is revoked."""
        keys = [each async for each in self.client.keys.list()]
        return {each.name[5:]: (list(each.projects), each.HasField("revoke_time")) for each in keys}

    def of_deletion(self) -> dict[str, AuditRecord]:
        """The records of the changes that came with deletions, by what was changed."""
        return {
            each.resources[1]: each for each in self.records if each.method.endswith("DeleteProject") and each.projects
        }


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    runtime, root = Runtime.memory(tmp_path / "cache"), ApiKey.new("root").text
    settings = IngestSettings(cache_dir=tmp_path / "cache")
    parts = Ingest(runtime, settings)
    await parts.keys.seed([Seed(key=root, role="operator")])  # type: ignore[arg-type]
    gate = Gate(Keyring(runtime.state(BUCKET)))
    tasks = [asyncio.create_task(run()) for run in (gate.run, runtime.quotas.run)]
    async with serving(parts, gate, runtime.audit) as client:
        client = client.with_key(root)
        for project in ("p", "q"):
            await client.projects.create(project)
        yield House(runtime, settings, parts, client)
    for task in tasks:
        task.cancel()


async def test_nobody_comes_into_the_next_project_with_a_key_of_the_one_before(house: House) -> None:
    ours, both = await house.key("ours", ROLE_OPERATOR, "p"), await house.key("both", ROLE_CONTRIBUTOR, "p", "q")
    other, mine = await house.key("other", ROLE_OPERATOR, "q"), await house.key("of-both", ROLE_OPERATOR, "p", "q")
    await house.client.quotas.set("projects/p", Limits(requests_per_minute=1000, runs=0))
    await until(lambda: house.runtime.quotas.limit(Kind.RUNS, "projects/p") == 0)
    watched = {}
    for project in ("p", "q"):
        source = (await both.sources.add_file(project, b"x = 1\n", path="a.py")).name
        await both.sources.wait(source)
        watched[project] = aiter(both.sources.watch(source))
        await anext(watched[project])
    began = time.monotonic()
    await ours.projects.delete("p", force=True)
    with pytest.raises(errors.KeyRevoked):
        await ours.projects.get("p")
    await house.client.projects.create("p")
    for attempt in (both.projects.get("p"), both.sources.upload("p", b"x"), mine.projects.delete("p")):
        with pytest.raises(errors.PermissionDenied):
            await attempt
    assert (await both.projects.get("q")).name == "projects/q"
    assert time.monotonic() - began < 5
    assert await house.states() == {
        "root": ([], False), "ours": ([], True), "both": (["projects/q"], False), "other": (["projects/q"], False),
        "of-both": (["projects/q"], False),
    }  # fmt: skip
    assert "ours" not in {each.name[5:] async for each in mine.keys.list()}, "of whoever was in the project before"
    assert not (await house.client.quotas.get("projects/p")).quota.etag
    await until(lambda: house.runtime.quotas.limit(Kind.RUNS, "projects/p") is None, 5)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(watched["q"]), 0.1)
    with pytest.raises((errors.PermissionDenied, StopAsyncIteration)):
        await asyncio.wait_for(anext(watched["p"]), 5)
    assert {each.name async for each in other.projects.list()} == {"projects/q"}


async def test_every_change_that_comes_with_a_deletion_is_in_the_audit_log_with_who_deleted(house: House) -> None:
    await house.key("one", ROLE_READER, "p")
    await house.key("both", ROLE_READER, "p", "q")
    await house.client.quotas.set("projects/p", Limits(runs=1))
    deleter, operator = await house.key("deleter", ROLE_OPERATOR, "p", "q"), await house.key("q-s", ROLE_OPERATOR, "q")
    await deleter.projects.delete("p")
    found = house.of_deletion()
    assert {name: list(each.projects) for name, each in found.items()} == {
        "keys/one": ["projects/p"],
        "keys/both": ["projects/p", "projects/q"],
        "keys/deleter": ["projects/p", "projects/q"],
        "projects/p/quota": ["projects/p"],
    }
    assert {each.caller for each in found.values()} == {"keys/deleter"}
    [call] = [each for each in house.records if each.method.endswith("DeleteProject") and not each.projects]
    assert {each.request_id for each in found.values()} == {call.request_id} and [c.name for c in call.changes] == [
        "projects/p"
    ]
    [change] = found["keys/both"].changes
    assert list(change.before["key"]["projects"]) == ["projects/p", "projects/q"]
    assert list(change.after["key"]["projects"]) == ["projects/q"]
    assert found["keys/one"].changes[0].after["key"]["revoke_time"]
    assert not found["projects/p/quota"].changes[0].HasField("after")
    seen = [each async for each in operator.audit.list("q")]
    assert not [each for each in seen if "keys/both" in each.resources], "it is of p, too"
    assert [each async for each in house.client.audit.list()] == house.records


@pytest.mark.parametrize("by", ["the next process", "the next of its name"])
async def test_a_deletion_that_was_cut_short_is_ended(house: House, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, both = await house.key("ours", ROLE_OPERATOR, "p"), await house.key("both", ROLE_READER, "p", "q")
    await house.client.quotas.set("projects/p", Limits(runs=0))

    async def killed(self: Grants, deletion: object) -> None:
        raise errors.StateUnavailable("killed")

    monkeypatch.setattr(deletions, "_PATIENCE", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(Grants, "end", killed)
        with pytest.raises(errors.StateUnavailable):
            await ours.projects.delete("p")
    assert (await house.states())["ours"] == (["projects/p"], False), "that was too early"
    if by == "the next of its name":
        await house.client.projects.create("p")
    else:
        monkeypatch.setattr(deletions, "_PATIENCE", 0.0)
        monkeypatch.setattr(deletions, "_LOOK", 0.01)
        task = asyncio.create_task(Ingest(house.runtime, house.settings).deletions.run())
        await until_gone(house.parts.tables.deletions.all)
        task.cancel()
    assert (await house.states())["ours"] == ([], True)
    assert (await house.states())["both"] == (["projects/q"], False)
    assert {each.caller for each in house.of_deletion().values()} == {"keys/ours"}
    assert await house.parts.tables.deletions.all() == []
    await house.key("new", ROLE_READER, "p")
    await asyncio.sleep(0.05)
    assert (await house.states())["new"] == (["projects/p"], False)
    with pytest.raises(errors.PermissionDenied):
        await both.projects.get("p")


async def test_nobody_lifts_his_limits_with_a_token_by_making_the_project_anew(house: House) -> None:
    await house.client.quotas.set("projects/p", Limits(runs=0))
    token = Caller("https://issuer#ada", Role.OPERATOR, frozenset({"projects/p", "projects/q"}))
    set_current(token)
    async with house.parts.deletions.deleting("projects/p"):
        await house.parts.tables.projects.delete("projects/p")
    await house.client.projects.create("p")
    assert (await house.client.quotas.get("projects/p")).effective.runs == 0


async def test_a_deletion_that_did_not_happen_takes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.key("ours", ROLE_READER, "p")
    await house.client.quotas.set("projects/p", Limits(runs=0))
    with pytest.raises(errors.EtagMismatch):
        await house.client.projects.delete("p", etag="1000")
    assert await house.parts.tables.deletions.all() == []

    async def away(name: str, *, etag: str = "") -> None:
        raise errors.StateUnavailable("away")

    for wait in ("_PATIENCE", "_NEVER"):
        monkeypatch.setattr(deletions, wait, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(house.parts.tables.projects, "delete", away)
        with pytest.raises(errors.StateUnavailable):
            await house.client.projects.delete("p")
    await until_gone(house.parts.tables.deletions.all)
    assert (await house.states())["ours"] == (["projects/p"], False)
    assert (await house.client.quotas.get("projects/p")).quota.etag


async def until_gone(all_: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while await all_():  # noqa: ASYNC110  # as an operator sees it
            await asyncio.sleep(0.01)
