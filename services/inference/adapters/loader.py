"""From a checkpoint's name to a staged version: fetched, verified, and put in memory off the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import (
    AdapterRejected,
    ArtifactNotFound,
    CheckpointNotFound,
    CodegraftError,
    DigestMismatch,
    ObjectNotFound,
)
from services.core.models.adapter_files import CONFIG, WEIGHTS
from services.core.store import Artifacts
from services.inference.adapters import verify
from services.inference.adapters.registry import Registry, Version

if TYPE_CHECKING:
    import torch

    from services.inference.adapters.lora import Weights


class Device(Protocol):
    """What the loader needs of the loaded model."""

    @property
    def base(self) -> verify.Base: ...

    def read(self, file: Path) -> Mapping[str, torch.Tensor]:
        """The tensors of a safetensors file."""
        ...

    def prepare(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float, sha256: str) -> Weights:
        """Verified matrices, ready to run."""
        ...


class Loader:
    """Loads adapters of the store."""

    def __init__(self, artifacts: Artifacts, registry: Registry) -> None:
        self._artifacts = artifacts
        self._registry = registry

    async def manifest(self, checkpoint: str) -> AdapterManifest:
        """A checkpoint's manifest.

        Raises:
            CheckpointNotFound: there is none of that name.
            StoreUnavailable: the store does not answer.
        """
        try:
            return await self._artifacts.manifest(checkpoint, AdapterManifest)
        except ArtifactNotFound:
            raise CheckpointNotFound(
                f"no checkpoint {checkpoint}", field="checkpoint", hint="List the run's checkpoints."
            ) from None

    async def load(self, checkpoint: str, device: Device, *, sha256: str = "") -> Version:
        """The checkpoint's version; nothing is done for one that is staged already.

        Args:
            sha256: the version it has to be; empty for whatever the manifest says.

        Raises:
            CheckpointNotFound, StoreUnavailable: as :meth:`manifest`.
            AdapterRejected, BaseModelMismatch, DigestMismatch: it does not verify.
        """
        if staged := self._registry.find(sha256, checkpoint=checkpoint):
            return staged
        manifest = await self.manifest(checkpoint)
        if sha256 and manifest.sha256 != sha256:
            raise DigestMismatch(f"{checkpoint} is version {manifest.sha256[:12]}, announced was {sha256[:12]}")
        verify.check_manifest(manifest, device.base)
        try:
            folder = await self._artifacts.fetch(checkpoint, manifest.files, only=(WEIGHTS, CONFIG))
        except ObjectNotFound as error:
            raise AdapterRejected(f"{checkpoint} is incomplete in the store: {error.message}") from None
        try:
            return await asyncio.to_thread(_stage, folder, manifest, device)
        except CodegraftError:
            raise
        except Exception as error:  # whatever a strange file makes the readers do, the service goes on
            raise AdapterRejected(f"{checkpoint} cannot be staged: {error!r}") from error


def _stage(folder: Path, manifest: AdapterManifest, device: Device) -> Version:
    scale = verify.check_config(folder, manifest)
    pairs = verify.check_tensors(device.read(folder / WEIGHTS), manifest, device.base)
    weights = device.prepare(pairs, scale, manifest.sha256)
    fmt = verify.prompt_format(manifest, device.base)
    return Version(manifest.sha256, manifest.name, weights, weights.rank, weights.size, fmt)
