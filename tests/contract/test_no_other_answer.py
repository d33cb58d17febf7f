"""A project that has a version is answered by one: whatever is away, damaged, slow or called alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import serving_pb2
from services.core import errors
from services.inference import completions
from tests.contract.inference_world import PROJECT, RUN, World, refused, refused_call, until

pytest_plugins = ["tests.contract.inference_fixtures"]


async def answered_by(world: World, **fields: Any) -> str:
    return str((await world.complete(max_tokens=2, **fields).end()).started.adapter_sha256)


def _zeros(parts: dict[str, Any]) -> None:
    parts["stored"] = b"\0" * 100


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], None]:
    """Makes the store of a replica's runtime one that does not answer."""

    def go(world: World) -> None:
        async def get(key: str) -> bytes:
            raise errors.StoreUnavailable("no store")

        monkeypatch.setattr(world.runtime.store, "get", get)

    return go


# --- from a pin to the latest best ---


async def test_while_the_best_is_not_known_what_serves_goes_on(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(inference_reconcile_seconds=0.3)
    one, two = await world.store(1, seed=1), await world.store(2, seed=2)
    await world.set("PINNED", one.checkpoint)
    world.peers.down = True
    serving = await world.set("LATEST_BEST")
    assert (serving.wanted_sha256, serving.pinned_checkpoint) == (one.sha256, "")
    assert await answered_by(world) == one.sha256
    world.peers.best_checkpoint, world.peers.down = replace(two, test_loss=9.0), False
    await world.until_active(two.sha256)  # however bad: a person has asked for it


async def test_a_best_that_does_not_verify_leaves_what_serves(world: World) -> None:
    one, damaged = await world.store(1, seed=1), await world.store(2, 2, _zeros)
    await world.set("PINNED", one.checkpoint)
    world.peers.best_checkpoint = damaged
    assert (await world.set("LATEST_BEST")).wanted_sha256 == one.sha256
    state = await world.status()
    assert await answered_by(world) == one.sha256 and state.status.failure.reason == "DIGEST_MISMATCH"


async def test_where_no_run_has_a_checkpoint_the_base_model_is_the_best(world: World) -> None:
    one = await world.store(1, seed=1)
    await world.set("PINNED", one.checkpoint)
    assert (await world.set("LATEST_BEST")).wanted_sha256 == "" == await answered_by(world)


# --- replicas that start ---


async def test_one_that_starts_while_the_store_is_away_has_what_the_disk_has(
    worlds: Callable[..., Any], away: Callable[[World], None]
) -> None:
    world: World = await worlds()
    one = await world.store(1, seed=1)
    await world.set("PINNED", one.checkpoint)
    text = (await world.complete().end()).text
    await until(lambda: len(list((world.replica._cache_dir / "adapters").glob("[!.]*"))) == 2)
    away(world)
    cold: World = await worlds(runtime=world.runtime)
    stream = await cold.complete().end()
    assert (stream.started.adapter_sha256, stream.text) == (one.sha256, text)


async def test_what_the_disk_says_of_another_checkpoint_is_not_believed(
    worlds: Callable[..., Any], away: Callable[[World], None], tmp_path: Path
) -> None:
    world: World = await worlds()
    one, two = await world.store(1, seed=1), await world.store(2, seed=2)
    for best in (one, two):
        await world.set("PINNED", best.checkpoint)
    await until(lambda: len(list((tmp_path / "adapters").glob("[!.]*"))) == 3)
    first, second = sorted((tmp_path / "manifests").iterdir())
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    away(world)
    cold: World = await worlds(runtime=world.runtime)
    assert await answered_by(cold) == ""
    assert (await cold.status()).status.failure.reason == "STORE_UNAVAILABLE"


async def test_a_way_back_writes_nothing_that_the_disk_has(world: World, tmp_path: Path) -> None:
    one = await world.store(1, seed=1)
    await world.set("PINNED", one.checkpoint)
    writes = world.replica.follower._manifests._writes
    await until(lambda: not writes)
    (file,) = (tmp_path / "manifests").iterdir()
    written = file.stat().st_ino
    await world.set("OFF")
    await world.set("PINNED", one.checkpoint)
    await until(lambda: not writes)
    assert file.stat().st_ino == written


async def test_one_that_starts_after_a_bad_pin_serves_what_the_others_do(worlds: Callable[..., Any]) -> None:
    world: World = await worlds()
    one, damaged = await world.store(1, seed=1), await world.store(2, 2, _zeros)
    for best in (one, damaged):
        await world.set("PINNED", best.checkpoint)
    cold: World = await worlds(runtime=world.runtime)
    assert await answered_by(world) == await answered_by(cold) == one.sha256
    for replica in (world, cold):
        status = (await replica.status()).status
        assert status.failure.reason == "DIGEST_MISMATCH" and not status.converged


class Slow:
    """A store that answers only once it is let."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self._get, self._free, self.asked = world.runtime.store.get, asyncio.Event(), list[str]()
        monkeypatch.setattr(world.runtime.store, "get", self._slowly)
        monkeypatch.setattr(completions, "_POLICY_WAIT", 0.1)

    async def _slowly(self, key: str) -> bytes:
        self.asked.append(key)
        await self._free.wait()
        return await self._get(key)

    def free(self) -> None:
        self._free.set()


async def test_what_is_mended_and_set_anew_serves_at_every_replica(worlds: Callable[..., Any]) -> None:
    world: World = await worlds()
    other: World = await worlds(runtime=world.runtime)
    one, two = await world.store(1, seed=1), await world.store(2, 2, lambda parts: parts.update(stored=b""))
    await world.set("PINNED", one.checkpoint)
    await world.set("PINNED", two.checkpoint)
    await until(lambda: two.sha256 in other.replica.follower.standing(PROJECT).refused)
    whole = await world.store(3, seed=2)
    assert whole.sha256 == two.sha256, "the same content is in the store again"
    await world.set("PINNED", two.checkpoint)
    for replica in (world, other):
        await replica.until_active(two.sha256)
        await until(lambda replica=replica: replica.replica.follower.standing(PROJECT).failure is None)  # type: ignore[misc]


async def test_a_version_that_takes_long_is_waited_for(
    worlds: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world: World = await worlds()
    one = await world.store(1, seed=1)
    await world.set("PINNED", one.checkpoint)
    slow = Slow(world, monkeypatch)
    cold: World = await worlds(runtime=world.runtime, cache_dir=tmp_path / "cold")
    for _ in range(2):
        answer = await refused(cold.complete())
        assert type(answer) is errors.ModelLoading and answer.retry_after, answer
    slow.free()
    await cold.until_active(one.sha256)
    assert await answered_by(cold) == one.sha256


async def test_nobody_begins_anew_because_a_caller_gave_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.peers.best_checkpoint = best = await world.store(1, seed=1)  # of a project that has no policy yet
    slow = Slow(world, monkeypatch)
    for _ in range(3):
        assert await answered_by(world) == ""
    slow.free()
    await world.until_active(best.sha256)
    assert slow.asked and len(slow.asked) == len(set(slow.asked))
    assert await answered_by(world) == best.sha256


async def test_of_a_project_that_may_not_be_there_nothing_is_written(world: World) -> None:
    world.peers.unsaid = True
    assert await answered_by(world, parent="projects/perhaps") == ""
    policies = world.replica.follower._policies
    assert await policies.find("projects/perhaps") is None
    world.peers.unsaid = False
    assert await answered_by(world, parent="projects/perhaps") == ""
    assert await policies.find("projects/perhaps") is not None


# --- the same weights with another scale ---


def _doubled(parts: dict[str, Any]) -> None:
    parts["config"]["lora_alpha"] *= 2


async def test_the_same_weights_by_another_scale_are_not_taken_for_the_same(world: World) -> None:
    one, doubled = await world.store(1, seed=1), await world.store(2, 1, _doubled)
    same = await world.store(1, seed=1, run=f"{PROJECT}/runs/two")
    assert one.sha256 == doubled.sha256 == same.sha256
    text = (await world.complete(adapter=pb.AdapterChoice(checkpoint=one.checkpoint)).end()).text
    assert (await world.complete(adapter=pb.AdapterChoice(checkpoint=same.checkpoint)).end()).text == text
    answer = await refused(world.complete(adapter=pb.AdapterChoice(checkpoint=doubled.checkpoint)))
    assert type(answer) is errors.AdapterRejected and one.checkpoint in answer.message and "scale 2" in answer.message
    await world.set("PINNED", one.checkpoint)
    await world.set("PINNED", doubled.checkpoint)
    status = (await world.status()).status
    assert status.failure.reason == "ADAPTER_REJECTED" and not status.converged
    assert (await world.complete().end()).text == text, "the old one serves"
    await world.set("OFF")
    await world.serving.UnloadAdapter(serving_pb2.UnloadAdapterRequest(checkpoint=one.checkpoint))
    # It is in host memory still, by the first one's scale.
    other = await world.complete(adapter=pb.AdapterChoice(checkpoint=doubled.checkpoint)).end()
    assert other.started.adapter_sha256 == one.sha256 and other.text != text
    again = serving_pb2.LoadAdapterRequest(checkpoint=f"{RUN}/checkpoints/1")
    assert type(await refused_call(world.serving.LoadAdapter(again))) is errors.AdapterRejected
