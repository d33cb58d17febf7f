"""Policies, swaps and adapters of the whole service: real gRPC and engine over a tiny model, NATS and store faked."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from codegraft.event.v1 import events_pb2
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import serving_pb2
from codegraft.trainer.v1.checkpoint_pb2 import AdapterProbe
from services.core import errors
from services.core.models import probe
from services.inference.adapters import lora
from tests.contract.inference_world import (
    PROJECT,
    RUN,
    Peers,
    Stream,
    World,
    refused_call,
    until,
)

pytest_plugins = ["tests.contract.inference_fixtures"]


async def test_a_new_best_is_swapped_in_under_a_running_stream(world: World) -> None:
    base_text = (await world.complete(max_tokens=200, timeout=90).end()).text
    with world.unhurried():
        running = await world.complete(max_tokens=200, timeout=90).begin()
        best = await world.store(10, seed=1)
        await world.publish(best)
        await world.until_active(best.sha256)
        assert world.replica.registry.streams(PROJECT) == {"": 1}, "the stream must still run when the swap happens"
    after = await world.complete(max_tokens=200, timeout=90).end()
    assert (await running.end()).text == base_text and running.started.adapter_sha256 == ""
    assert after.started.adapter_sha256 == best.sha256 and after.started.checkpoint == best.checkpoint
    assert after.text != base_text
    status = (await world.status()).status
    assert status.converged and status.active_checkpoint == best.checkpoint and status.last_swap_seconds > 0
    swapped = world.told("codegraft.inference.adapter.swapped.v1")[-1].unpack(events_pb2.AdapterSwapped)
    assert (swapped.replica, swapped.from_sha256, swapped.to_sha256) == ("r1", "", best.sha256)
    phases = [swapped.phases.fetch, swapped.phases.verify, swapped.phases.stage, swapped.phases.probe]
    assert min(phases) > 0 and sum(phases) <= swapped.seconds


async def test_streams_over_swaps_equal_their_replay(world: World) -> None:
    bests = [await world.store(step, seed=step) for step in (1, 2, 3)]
    replay = {best.sha256: "" for best in bests} | {"": ""}
    for best in (None, *bests):
        choice = pb.AdapterChoice(checkpoint=best.checkpoint) if best else pb.AdapterChoice(base=True)
        stream = await world.complete(max_tokens=60, adapter=choice).end()
        assert stream.started.adapter_sha256 == (best.sha256 if best else "")
        replay[stream.started.adapter_sha256] = stream.text
    assert len(set(replay.values())) == 4
    seen: list[Stream] = []
    done = asyncio.Event()

    async def editor() -> None:
        while not done.is_set():
            seen.append(await world.complete(max_tokens=60).end())

    async def answered_by(sha256: str) -> None:
        await until(lambda: any(stream.started.adapter_sha256 == sha256 for stream in seen), 20)

    editors = [asyncio.create_task(editor()) for _ in range(3)]
    await answered_by("")
    for best in bests:
        await world.publish(best)
        await world.until_active(best.sha256)
        await answered_by(best.sha256)
    done.set()
    await asyncio.gather(*editors)
    assert all(stream.text == replay[stream.started.adapter_sha256] for stream in seen)
    assert len(world.replica.registry.holdings()) <= 2, "no more than there are places"


async def test_policies_off_pinned_latest_best(world: World) -> None:
    one, two = await world.store(1, seed=1), await world.store(2, seed=2)
    world.peers.best_checkpoint = two

    async def choose(mode: Any, checkpoint: str = "") -> tuple[str, bool]:
        request = serving_pb2.SetServingRequest(parent=PROJECT, mode=mode, checkpoint=checkpoint)
        await world.serving.SetServing(request)
        stream = await world.complete(max_tokens=2).end()
        return stream.started.adapter_sha256, (await world.status()).status.converged

    assert await choose(serving_pb2.SERVING_MODE_PINNED, one.checkpoint) == (one.sha256, True)
    assert world.peers.kept == [one.checkpoint], "the trainer is asked not to delete it"
    assert await choose(serving_pb2.SERVING_MODE_LATEST_BEST) == (two.sha256, True)
    assert await choose(serving_pb2.SERVING_MODE_OFF) == ("", True)
    await world.publish(await world.store(3, seed=3))
    await asyncio.sleep(0.1)
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == "", "OFF stays off"
    world.peers.down = True
    assert await choose(serving_pb2.SERVING_MODE_PINNED, one.checkpoint) == (one.sha256, True), "without the trainer"
    world.peers.down = False
    await world.publish(await world.store(4, seed=4))
    await asyncio.sleep(0.1)
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == one.sha256, "a pin stays"
    serving = (await world.status()).serving
    stale = serving_pb2.SetServingRequest(parent=PROJECT, mode=serving_pb2.SERVING_MODE_OFF, etag="1")
    assert serving.etag != "1" and type(await refused_call(world.serving.SetServing(stale))) is errors.EtagMismatch


async def test_a_project_without_policy_follows_the_latest_best(world: World) -> None:
    assert (await world.status()).serving.mode == serving_pb2.SERVING_MODE_LATEST_BEST
    best = await world.store(1, seed=1)
    world.peers.best_checkpoint = best  # its event was lost
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == best.sha256


async def test_a_lost_event_is_caught_up_by_the_reconcile(worlds: Callable[..., Any]) -> None:
    world = await worlds(inference_reconcile_seconds=0.1)
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == ""
    best = world.peers.best_checkpoint = await world.store(1, seed=1)
    await world.until_active(best.sha256)


async def test_an_event_serves_while_the_trainer_is_down(world: World) -> None:
    world.peers.down = True
    best = await world.store(1, seed=1)
    await world.publish(best)
    await world.until_active(best.sha256)
    late = await world.store(0, seed=9)
    await world.publish(late)  # an older one of the same run, with a higher loss
    await asyncio.sleep(0.2)
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == best.sha256


async def test_a_cold_replica_starts_on_the_durable_version(world: World, worlds: Callable[..., Any]) -> None:
    best = await world.store(1, seed=1)
    await world.publish(best)
    await world.until_active(best.sha256)
    other = await worlds(runtime=world.runtime, peers=Peers(down=True), inference_replica="r2")
    assert (await other.complete(max_tokens=2).end()).started.adapter_sha256 == best.sha256
    request = serving_pb2.SetServingRequest(parent=PROJECT, mode=serving_pb2.SERVING_MODE_OFF)
    await other.serving.SetServing(request)
    await until(lambda: world.replica.registry.route(PROJECT).main is None)  # every replica converges


def _nan(parts: dict[str, Any]) -> None:
    next(iter(parts["tensors"].values()))[0, 0] = float("nan")


def _shape(parts: dict[str, Any]) -> None:
    name = next(iter(parts["tensors"]))
    parts["tensors"][name] = torch.zeros(4, 5)


def _unknown_layer(parts: dict[str, Any]) -> None:
    parts["tensors"]["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)


def _overflow(parts: dict[str, Any]) -> None:
    for tensor in parts["tensors"].values():
        tensor.fill_(1e30)  # every value is finite, their products are not


def _half_pair(parts: dict[str, Any]) -> None:
    parts["tensors"].popitem()


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other base model": (lambda p: p.update(base_digest="e" * 64), "BASE_MODEL_MISMATCH"),
    "digest": (lambda p: p.update(sha256="f" * 64), "DIGEST_MISMATCH"),
    "corrupt in the store": (lambda p: p.update(stored=save(p["tensors"])[:-1] + b"x"), "DIGEST_MISMATCH"),
    "truncated in the store": (lambda p: p.update(stored=save(p["tensors"])[:1000]), "DIGEST_MISMATCH"),
    "gone from the store": (lambda p: p.update(stored=b""), "ADAPTER_REJECTED"),
    "rank of the manifest": (lambda p: p.update(lora_r=2), "ADAPTER_REJECTED"),
    "rank above the limit": (lambda p: p.update(lora_r=64), "ADAPTER_REJECTED"),
    "not finite": (_nan, "ADAPTER_REJECTED"),
    "overflow in the probe": (_overflow, "ADAPTER_REJECTED"),
    "shape": (_shape, "ADAPTER_REJECTED"),
    "unknown layer": (_unknown_layer, "ADAPTER_REJECTED"),
    "too large": (lambda p: p.update(data=save(p["tensors"]) + bytes(2 << 20)), "ADAPTER_REJECTED"),
    "half a pair": (_half_pair, "ADAPTER_REJECTED"),
    "nothing": (lambda p: p.update(tensors={"x": torch.zeros(0)}), "ADAPTER_REJECTED"),
    "truncated": (lambda p: p.update(data=save(p["tensors"])[:-100]), "ADAPTER_REJECTED"),
    "pickle": (lambda p: p["extra"].update({"adapter_model.bin": b"\x80\x04."}), "ADAPTER_REJECTED"),
    "pickle as safetensors": (lambda p: p.update(data=b"\x80\x04]q\x00." * 10), "ADAPTER_REJECTED"),
    "config": (lambda p: p["config"].pop("r"), "ADAPTER_REJECTED"),
    "dora": (lambda p: p["config"].update(use_dora=True), "ADAPTER_REJECTED"),
}


@pytest.mark.parametrize("case", SPOILED)
async def test_a_bad_adapter_never_serves(worlds: Callable[..., Any], tmp_path: Path, case: str) -> None:
    """It is refused within a second; the machine may stand still for as long now and then, but not each time."""
    for number in range(3):
        if await seconds_to_refuse(await worlds(cache_dir=tmp_path / str(number)), *SPOILED[case]) < 1:
            return
    raise AssertionError("each refusal took more than a second")


async def seconds_to_refuse(world: World, spoil: Callable[[dict[str, Any]], None], reason: str) -> float:
    good = await world.store(1, seed=1)
    await world.publish(good)
    await world.until_active(good.sha256)
    before = (await world.complete().end()).text
    bad = await world.store(2, 2, spoil)
    began = time.monotonic()
    await world.publish(bad)
    rejected = "codegraft.inference.adapter.rejected.v1"
    await until(lambda: bool(world.told(rejected)))
    took = time.monotonic() - began
    event = world.told(rejected)[0].unpack(events_pb2.AdapterRejected)
    assert (event.reason, event.checkpoint) == (reason, bad.checkpoint) and event.message
    assert (event.sha256, event.active_sha256) == (bad.sha256, good.sha256) and 0 < event.seconds <= took
    after = await world.complete().end()
    assert after.started.adapter_sha256 == good.sha256 and after.text == before
    state = await world.status()
    assert state.status.failure.reason == reason and state.serving.wanted_sha256 == good.sha256
    answer = await refused_call(world.serving.LoadAdapter(serving_pb2.LoadAdapterRequest(checkpoint=bad.checkpoint)))
    assert answer.reason == reason
    assert world.peers.held == [good.checkpoint], "it is no longer the trainer's best one"
    await world.publish(await world.store(3, seed=3))  # the next good one is taken as if nothing had been
    await until(lambda: not world.replica.follower.standing(PROJECT).failure)
    return took


def trained(parts: dict[str, Any], reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> AdapterProbe:
    """What the trainer says of an adapter, by its definition: the base's weights plus the adapter's products."""
    model = copy.deepcopy(reference)
    for path in lora.adaptable(model):
        a, b = (parts["tensors"][f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        model.get_submodule(path).weight.data += 2.0 * b @ a
    ids = probe.prompt(tokenizer)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()
    return AdapterProbe(ids=ids, losses=losses, tolerance=probe.TOLERANCE)


async def test_weights_that_are_not_those_that_were_trained_are_refused(
    world: World, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def told(parts: dict[str, Any]) -> None:
        parts["probe"] = trained(parts, reference, tokenizer)

    def altered(parts: dict[str, Any]) -> None:
        told(parts)
        for name, tensor in parts["tensors"].items():
            if "lora_B" in name and "layers.1." in name:
                tensor.neg_()  # and the digests are made to fit

    good = await world.store(1, 1, told)
    await world.publish(good)
    await world.until_active(good.sha256)
    bad = await world.store(2, 2, altered)
    await world.publish(bad)
    await until(lambda: bool(world.told("codegraft.inference.adapter.rejected.v1")))
    event = world.told("codegraft.inference.adapter.rejected.v1")[0].unpack(events_pb2.AdapterRejected)
    assert (event.reason, event.checkpoint, event.active_sha256) == ("ADAPTER_REJECTED", bad.checkpoint, good.sha256)
    assert "not the adapter that was trained" in event.message
    assert (await world.complete(max_tokens=2).end()).started.adapter_sha256 == good.sha256

    def strange(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda parts: parts.update(
            probe=AdapterProbe(**{"ids": [1, 2], "losses": [1], "tolerance": 1, **fields})
        )

    for step, fields in enumerate(
        ({"ids": [1]}, {"losses": [1, 2]}, {"losses": [float("nan")]}, {"tolerance": float("nan")}, {"ids": [1, 10**6]})
    ):
        best = await world.store(10 + step, 3, strange(**fields))
        request = serving_pb2.LoadAdapterRequest(checkpoint=best.checkpoint)
        assert type(await refused_call(world.serving.LoadAdapter(request))) is errors.AdapterRejected, fields


async def test_a_pin_that_is_not_there_or_does_not_fit_is_refused(world: World) -> None:
    def pin(checkpoint: str) -> Any:
        return world.serving.SetServing(
            serving_pb2.SetServingRequest(parent=PROJECT, mode=serving_pb2.SERVING_MODE_PINNED, checkpoint=checkpoint)
        )

    foreign = await world.store(5, 5, lambda parts: parts.update(base_digest="e" * 64))
    assert type(await refused_call(pin(f"{RUN}/checkpoints/404"))) is errors.CheckpointNotFound
    assert type(await refused_call(pin(foreign.checkpoint))) is errors.BaseModelMismatch
    assert type(await refused_call(pin("nonsense"))) is errors.InvalidName
    assert (await world.status()).serving.etag == ""
    damaged = await world.store(6, 6, _nan)
    serving = (await pin(damaged.checkpoint)).serving
    state = await world.status()
    assert serving.wanted_sha256 == damaged.sha256 and not state.status.converged
    assert state.status.failure.reason == "ADAPTER_REJECTED" and state.status.active_sha256 == ""


async def test_watch_tells_policy_and_swap(world: World) -> None:
    watch = world.serving.WatchServing(serving_pb2.WatchServingRequest(parent=PROJECT))
    first = await watch.read()
    assert first.status.ready and first.status.active_sha256 == ""
    best = await world.store(1, seed=1)
    await world.publish(best)
    while (state := await asyncio.wait_for(watch.read(), 20)).status.active_sha256 != best.sha256:
        pass
    assert state.status.converged and state.serving.wanted_checkpoint == best.checkpoint
    watch.cancel()


async def test_load_list_unload(world: World) -> None:
    best = await world.store(1, seed=1)
    loaded = await world.serving.LoadAdapter(serving_pb2.LoadAdapterRequest(checkpoint=best.checkpoint))
    assert (loaded.adapter.lora_r, loaded.adapter.sha256) == (4, best.sha256) and loaded.adapter.size > 0
    listed = await world.serving.ListAdapters(serving_pb2.ListAdaptersRequest(page_size=1))
    assert [adapter.checkpoint for adapter in listed.adapters] == [best.checkpoint] and not listed.next_page_token
    await world.publish(best)
    await world.until_active(best.sha256)
    unload = serving_pb2.UnloadAdapterRequest(checkpoint=best.checkpoint)
    assert type(await refused_call(world.serving.UnloadAdapter(unload))) is errors.FailedPrecondition
    request = serving_pb2.SetServingRequest(parent=PROJECT, mode=serving_pb2.SERVING_MODE_OFF)
    await world.serving.SetServing(request)
    await world.serving.UnloadAdapter(unload)
    assert world.replica.registry.holdings() == []
    assert type(await refused_call(world.serving.UnloadAdapter(unload))) is errors.CheckpointNotFound
    negative = world.serving.ListAdapters(serving_pb2.ListAdaptersRequest(page_size=-1))
    assert type(await refused_call(negative)) is errors.InvalidPageSize


async def test_checkpoints_with_the_same_weights_are_listed_and_unloaded_by_each_name(world: World) -> None:
    one, two = [await world.store(1, seed=1, run=f"{PROJECT}/runs/{run}") for run in ("first", "second")]
    assert one.sha256 == two.sha256
    other = await world.store(1, seed=1, run="projects/other/runs/first")
    for best in (other, one, two):
        answer = await world.serving.LoadAdapter(serving_pb2.LoadAdapterRequest(checkpoint=best.checkpoint))
        assert answer.adapter.checkpoint == best.checkpoint, "as it was asked for"
    assert list(answer.adapter.checkpoints) == [one.checkpoint, two.checkpoint], "nothing of other projects"
    (listed,) = (await world.serving.ListAdapters(serving_pb2.ListAdaptersRequest())).adapters
    assert set(listed.checkpoints) == {one.checkpoint, two.checkpoint, other.checkpoint}
    assert listed.checkpoint == other.checkpoint, "the first"
    await world.serving.UnloadAdapter(serving_pb2.UnloadAdapterRequest(checkpoint=two.checkpoint))
    assert world.replica.registry.holdings() == []
    choice = pb.AdapterChoice(checkpoint=two.checkpoint)  # from host memory, where they have the name of the first
    assert (await world.complete(adapter=choice).end()).started.checkpoint == two.checkpoint
    (listed,) = (await world.serving.ListAdapters(serving_pb2.ListAdaptersRequest())).adapters
    assert list(listed.checkpoints) == [two.checkpoint] == [listed.checkpoint]
