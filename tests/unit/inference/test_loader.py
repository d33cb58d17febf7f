"""From the store to a place: looked for in every tier, verified before it takes a place, probed before it may serve."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core import errors
from services.core.models.prompts import detect
from services.core.runtime import Runtime
from services.inference.adapters.disk import DiskCache
from services.inference.adapters.host import HostCache
from services.inference.adapters.loader import Loader
from services.inference.adapters.lora import Weights
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.registry import Registry
from services.inference.adapters.verify import CONFIG, WEIGHTS, Base
from tests.unit.inference.tiny import make_tokenizer

SIZE = 4 * (2 * 3 + 5 * 2)
"""Bytes of one adapter's matrices."""


@dataclass
class Device:
    """A device of one layer, which counts."""

    base: Base = field(default_factory=lambda: Base("m", "d", detect(make_tokenizer()), {"layer": (5, 3)}, 8))
    losses: Sequence[float] = (1.0, 2.0)
    prepared: int = 0
    probed: int = 0
    sharing: int = 0
    calming: int = 0
    busy: threading.Event | None = None
    """While it is not set a copy lasts."""
    copying: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.sharing += 1
        yield
        self.sharing -= 1

    @contextmanager
    def calm(self) -> Iterator[None]:
        self.calming += 1
        yield
        self.calming -= 1

    def read(self, data: bytes) -> Mapping[str, torch.Tensor]:
        assert self.sharing and self.calming, "steps are short, and leave cores to who verifies"
        return load(data)

    def prepare(self, pairs: Mapping[str, Any], scale: float, sha256: str) -> Weights:
        self.prepared += 1
        if self.busy:
            self.copying.release()
            self.busy.wait(5)
        return Weights(pairs, {}, 2, SIZE, sha256, torch.float32)

    def stage(self, weights: Weights) -> None:
        assert weights.size == SIZE

    def probe(self, weights: Weights, ids: Sequence[int]) -> list[float]:
        assert self.calming and not self.sharing
        self.probed += 1
        return list(self.losses)


class House:
    """A loader over the given limits, with adapters in the store."""

    def __init__(self, folder: Path, places: int, host: int, disk: int) -> None:
        self.runtime, self.device, self.registry = Runtime.memory(), Device(), Registry(places)
        self.disk = DiskCache(folder, self.runtime.blobs, disk, later=0)
        manifests = Manifests(self.runtime.artifacts, folder.with_name(f"{folder.name}-manifests"))
        self.loader = Loader(manifests, self.disk, HostCache(host), self.registry)

    async def store(self, step: int) -> str:
        tensors = {
            "base_model.model.layer.lora_A.weight": torch.full((2, 3), float(step)),
            "base_model.model.layer.lora_B.weight": torch.ones(5, 2),
        }
        data, name = save(tensors), f"projects/p/runs/r/checkpoints/{step}"
        sha256 = hashlib.sha256(data).hexdigest()
        manifest = AdapterManifest(name=name, sha256=sha256, base_model="m", base_digest="d", lora_r=2)
        config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).encode()
        await self.runtime.artifacts.commit(name, manifest, {WEIGHTS: data, CONFIG: config})
        return name

    async def pinned(self, checkpoint: str, patience: float = 0.0) -> Any:
        loaded = await self.loader.load(checkpoint, self.device, patience=patience)
        pin = self.registry.pin_version("projects/p", loaded.version)
        assert pin is not None and pin.version is not None and pin.version.checkpoint == checkpoint
        assert pin.weights.layers["layer"][0][0, 0] == int(checkpoint.rpartition("/")[2]), "another one's weights"
        return pin

    def break_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def get(key: str) -> bytes:
            raise errors.StoreUnavailable("no store")

        monkeypatch.setattr(self.runtime.store, "get", get)


async def test_hundreds_of_adapters_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path, places=3, host=50 * SIZE, disk=10**6)
    names = [await house.store(step) for step in range(200)]
    for name in names:
        (await house.pinned(name)).release()
    assert (house.device.prepared, house.device.probed) == (200, 200) and len(house.registry.holdings()) == 3
    await house.disk.written()
    house.break_store(monkeypatch)
    for name in names[-50:]:
        (await house.pinned(name)).release()
    assert (house.device.prepared, house.device.probed) == (250, 200), "from host memory, where they have passed"
    for name in names[:10]:
        (await house.pinned(name)).release()
    assert (house.device.prepared, house.device.probed) == (260, 210), "from the disk, verified and probed anew"
    assert all(holding.streams == 0 for holding in house.registry.holdings())


async def test_one_load_for_all_who_ask_at_once(tmp_path: Path) -> None:
    house = House(tmp_path, places=2, host=0, disk=10**6)
    name = await house.store(1)
    loaded = await asyncio.gather(*(house.loader.load(name, house.device) for _ in range(8)))
    assert house.device.prepared == 1 and len({one.version for one in loaded}) == 1
    assert [one.phases.fetch > 0 for one in loaded].count(True) == 1
    phases = next(one.phases for one in loaded if one.phases.fetch)
    assert phases.verify > 0 and phases.stage > 0 and phases.probe > 0


async def test_who_stages_waits_for_a_place(tmp_path: Path) -> None:
    house = House(tmp_path, places=2, host=10**6, disk=10**6)
    names = [await house.store(step) for step in range(4)]
    pins = [await house.pinned(name) for name in names[:2]]
    with pytest.raises(errors.ResourceExhausted) as caught:
        await house.pinned(names[2])
    assert caught.value.retry_after and caught.value.hint
    waiting = [asyncio.create_task(house.pinned(name, patience=20)) for name in names[2:]]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    threading.Thread(target=pins[0].release).start()  # the engine's thread
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=15)
    assert len(done) == 1 and len(house.registry.holdings()) == 2
    pins[1].release()
    for pin in await asyncio.gather(*waiting):
        pin.release()
    pins = [await house.pinned(name) for name in names[:2]]
    with pytest.raises(errors.ResourceExhausted):
        await house.pinned(names[2], patience=0.02)
    assert len(house.registry.holdings()) == len(pins)


async def test_one_that_fails_or_is_given_up_leaves_its_place(tmp_path: Path) -> None:
    house = House(tmp_path, places=2, host=10**6, disk=10**6)
    names = [await house.store(step) for step in range(4)]
    house.device.losses = [1.0, float("nan")]
    for name in names:
        with pytest.raises(errors.AdapterRejected, match="not finite"):
            await house.loader.load(name, house.device)
    house.device.losses, house.device.busy = [1.0], threading.Event()
    given_up = [asyncio.create_task(house.loader.load(name, house.device)) for name in names[:2]]
    for _ in given_up:
        assert await asyncio.to_thread(house.device.copying.acquire, timeout=5)
    for task in given_up:
        task.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    house.device.busy.set()
    pins = [await house.pinned(name) for name in names[2:]]
    assert [holding.streams for holding in house.registry.holdings()] == [1, 1] and len(pins) == 2


async def test_steps_do_not_give_way_for_as_long_as_a_store_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, waited = House(tmp_path, places=3, host=10**6, disk=10**6), list[str]()
    name, get = await house.store(1), house.runtime.store.get

    async def slow(key: str) -> bytes:
        async with asyncio.timeout(20):
            while house.device.calming or house.device.sharing:  # nobody tells
                waited.append(key)
                await asyncio.sleep(0.01)
        return await get(key)

    monkeypatch.setattr(house.runtime.store, "get", slow)
    (await house.pinned(name)).release()
    assert waited, "at first they do"
