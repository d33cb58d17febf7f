"""From a checkpoint's name to a place in device memory: fetched, verified, staged and probed off the engine's thread.

An adapter is looked for in device memory, in host memory, on the disk and in the store, in that order; what comes from
the disk or the store is verified from its first byte. It takes a place only when it is verified, and may be served
only when it has answered the probe in that place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from codegraft.event.v1.events_pb2 import SwapPhases
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import AdapterRejected, CodegraftError, DigestMismatch, ObjectNotFound, ResourceExhausted
from services.core.models.adapter_files import CONFIG, WEIGHTS
from services.core.telemetry import tracing
from services.inference.adapters import verify
from services.inference.adapters.disk import DiskCache
from services.inference.adapters.host import HostCache, Verified
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.registry import Registry
from services.inference.adapters.route import Version

if TYPE_CHECKING:
    import torch

    from services.core.models.prompts import PromptFormat
    from services.inference.adapters.lora import Weights

_MOMENT = 0.3
"""Seconds: an adapter of a small model comes from a store nearby in a tenth of it."""


class Device(Protocol):
    """What the loader needs of the loaded model. May be called from any thread, beside the engine's."""

    @property
    def base(self) -> verify.Base: ...

    def shared(self) -> AbstractContextManager[Any]:
        """Held while somebody needs the processor: meanwhile steps that run on it leave half of the cores."""
        ...

    def read(self, data: bytes) -> Mapping[str, torch.Tensor]:
        """The tensors of a safetensors file, on the CPU."""
        ...

    def prepare(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float, sha256: str) -> Weights:
        """Verified matrices, ready to run.

        Raises:
            ResourceExhausted: the device has no memory for them now.
        """
        ...

    def stage(self, weights: Weights) -> None:
        """Puts them where steps find them that mix several adapters.

        Raises:
            ResourceExhausted: as :meth:`prepare`.
        """
        ...

    def calm(self) -> AbstractContextManager[None]:
        """Held while a version is on its way: steps are short meanwhile, so that what disturbs one of them disturbs
        little, and whoever asks for the version waits for none of them for long."""
        ...

    def probe(self, weights: Weights, ids: Sequence[int]) -> list[float]:
        """The loss of each token of a prompt after the first, in nats.

        Args:
            ids: the prompt; the device's own when there are none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version in its place, and what it took."""

    version: Version
    phases: SwapPhases = field(default_factory=SwapPhases)
    """Seconds; all zero for one that was there already."""


class Loader:
    """Loads adapters. All methods belong to one event loop."""

    def __init__(self, manifests: Manifests, disk: DiskCache, host: HostCache, registry: Registry) -> None:
        self._manifests, self._disk, self._host, self._registry = manifests, disk, host, registry
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._free = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:  # called by the engine's thread, also after the end of the loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._free.set)

        registry.listen(wake)

    async def load(self, checkpoint: str, device: Device, *, sha256: str = "", patience: float = 0.0) -> Loaded:
        """The checkpoint's version in device memory; nothing is done for one that is there.

        Nothing else runs between the return and the caller's next step, so the version can be pinned without a race.

        Args:
            sha256: the version it has to be; empty for whatever the manifest says.
            patience: seconds to wait for a place while all are in use.

        Raises:
            CheckpointNotFound, StoreUnavailable: as :meth:`Manifests.get`.
            AdapterRejected, BaseModelMismatch, DigestMismatch: it does not verify.
            AdapterRejected: its weights are here as another checkpoint's, which means something else by them.
            ResourceExhausted: all places are in use.
        """
        if staged := self._registry.ask(checkpoint, sha256):
            return Loaded(staged)
        sha256 = sha256 or (await self._manifests.get(checkpoint)).sha256
        async with self._loading.setdefault(sha256, asyncio.Lock()):
            if staged := self._registry.ask(checkpoint, sha256):  # by somebody who asked at the same time
                return Loaded(staged)
            if staged := await self._by_another_name(checkpoint, sha256, device):
                return Loaded(staged)
            phases = SwapPhases()
            held = await self._held(checkpoint, sha256, device)
            verified = held or await self._verified(checkpoint, sha256, device, phases)
            version = await self._staged(checkpoint, verified, device, phases, patience, probe=held is None)
            self._host.put(verified)
            return Loaded(version, phases)

    async def _by_another_name(self, checkpoint: str, sha256: str, device: Device) -> Version | None:
        """A version of the same weights that is staged already, by this name from now on."""
        if (twin := self._registry.find(sha256)) is None:
            return None
        if _means(twin) != (here := await self._meaning(checkpoint, sha256, device)):
            raise AdapterRejected(
                f"{checkpoint} has the weights of {twin.checkpoint}, which is served by scale {twin.scale:g}; "
                f"here it is {here[0]:g}, or the prompts are others",
                hint="Unload that one first, or save the adapter with the scale in its weights.",
            )
        return self._registry.call(checkpoint, sha256)

    async def _held(self, checkpoint: str, sha256: str, device: Device) -> Verified | None:
        """The checkpoint's adapter in host memory, where it may have another name."""
        held = self._host.get(sha256)
        if held is None or held.checkpoint == checkpoint:
            return held
        return held if _means(held) == await self._meaning(checkpoint, sha256, device) else None

    async def _meaning(self, checkpoint: str, sha256: str, device: Device) -> tuple[float, PromptFormat]:
        """What the file of the weights, by which a version is named, does not say: scale and prompts."""
        manifest = await self._manifest(checkpoint, sha256, device)
        (config,) = await self._files(manifest, CONFIG)
        return verify.check_config(config, manifest), verify.prompt_format(manifest, device.base)

    async def _manifest(self, checkpoint: str, sha256: str, device: Device) -> AdapterManifest:
        manifest = await self._manifests.get(checkpoint)
        if manifest.sha256 != sha256:
            raise DigestMismatch(f"{checkpoint} is version {manifest.sha256[:12]}, announced was {sha256[:12]}")
        verify.check_manifest(manifest, device.base)
        return manifest

    async def _files(self, manifest: AdapterManifest, *paths: str) -> list[bytes]:
        digests = {file.path: file.sha256 for file in manifest.files}
        try:
            return await asyncio.gather(*(self._disk.read(digests[path]) for path in paths))
        except ObjectNotFound as error:
            raise AdapterRejected(f"{manifest.name} is incomplete in the store: {error.message}") from None

    async def _verified(self, checkpoint: str, sha256: str, device: Device, phases: SwapPhases) -> Verified:
        # Of a step on all cores one thread would be waited for, whose core is taken away.
        with _timed(phases, "fetch"), _at_first(device.calm(), device.shared()):
            manifest = await self._manifest(checkpoint, sha256, device)
            weights, config = await self._files(manifest, WEIGHTS, CONFIG)
        with _timed(phases, "verify"), _strange_files(checkpoint), device.calm(), device.shared():
            return await asyncio.to_thread(_verify, manifest, weights, config, device)

    async def _staged(
        self,
        checkpoint: str,
        verified: Verified,
        device: Device,
        phases: SwapPhases,
        patience: float,
        *,
        probe: bool,
    ) -> Version:
        with _timed(phases, "wait"):
            await self._reserve(patience)
        try:
            with _strange_files(checkpoint), device.calm():
                with _timed(phases, "stage"):
                    weights = await asyncio.to_thread(device.prepare, verified.pairs, verified.scale, verified.sha256)
                with _timed(phases, "probe"):
                    staging = asyncio.to_thread(device.stage, weights)
                    if probe:
                        prompt = verified.probe.ids if verified.probe else ()
                        losses, _ = await asyncio.gather(asyncio.to_thread(device.probe, weights, prompt), staging)
                        verify.check_probe(checkpoint, verified.probe, losses)
                    else:
                        await staging
        except BaseException:
            self._registry.cancel()
            raise
        # By the name that is asked for: in host memory it may have that of another run, or none of this time.
        version = Version(
            verified.sha256, checkpoint, weights.rank, weights.size, verified.format, scale=verified.scale
        )
        self._registry.put(version, weights)
        return version

    async def _reserve(self, patience: float) -> None:
        until = time.monotonic() + patience
        while True:
            self._free.clear()  # before the question, so that no answer between it and the wait is lost
            if self._registry.reserve():
                return
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._free.wait()
            except TimeoutError:
                raise ResourceExhausted(
                    "all places for adapters are held by running completions, or by LoadAdapter",
                    hint="Try again, unload some, or set CODEGRAFT_INFERENCE_DEVICE_ADAPTERS higher.",
                    retry_after=1.0,
                ) from None


def _means(of: Verified | Version) -> tuple[float, PromptFormat | None]:
    return of.scale, of.format


def _verify(manifest: AdapterManifest, weights: bytes, config: bytes, device: Device) -> Verified:
    scale = verify.check_config(config, manifest)
    pairs = verify.check_tensors(device.read(weights), manifest, device.base)
    size = sum(matrix.nbytes for pair in pairs.values() for matrix in pair)
    fmt = verify.prompt_format(manifest, device.base)
    probe = manifest.probe if manifest.HasField("probe") else None
    return Verified(manifest.sha256, manifest.name, pairs, scale, fmt, size, probe)


@contextmanager
def _at_first(*held: AbstractContextManager[Any]) -> Iterator[None]:
    """Holds these for a moment at most: a store that takes longer keeps nobody's processor busy meanwhile."""
    with ExitStack() as stack:
        for one in held:
            stack.enter_context(one)
        timer = asyncio.get_running_loop().call_later(_MOMENT, stack.close)
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def _strange_files(checkpoint: str) -> Iterator[None]:
    """Whatever a strange file makes the readers do, the service goes on."""
    try:
        yield
    except CodegraftError:
        raise
    except Exception as error:
        raise AdapterRejected(f"{checkpoint} cannot be staged: {error!r}") from error


@contextmanager
def _timed(phases: SwapPhases, phase: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        with tracing.span(f"adapter {phase}"):
            yield
    finally:
        setattr(phases, phase, getattr(phases, phase) + time.monotonic() - began)
