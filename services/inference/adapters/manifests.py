"""What the store says of checkpoints, remembered: a manifest never changes under its name."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import ArtifactNotFound, CheckpointNotFound, StoreUnavailable
from services.core.store import Artifacts

_REMEMBERED = 1024


class Manifests:
    """The manifests of checkpoints. All methods belong to one event loop."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._known: OrderedDict[str, AdapterManifest] = OrderedDict()
        self._test_sets: OrderedDict[str, str] = OrderedDict()
        """By dataset."""

    async def get(self, checkpoint: str, *, fresh: bool = False) -> AdapterManifest:
        """A checkpoint's manifest.

        Args:
            fresh: ask the store, which no longer has that of a deleted checkpoint; while it does not answer, what is
                remembered counts.

        Raises:
            CheckpointNotFound: there is none of that name.
            StoreUnavailable: the store does not answer, and this one is not remembered.
        """
        if not fresh and checkpoint in self._known:
            self._known.move_to_end(checkpoint)
            return self._known[checkpoint]
        try:
            found = await self._artifacts.manifest(checkpoint, AdapterManifest)
        except ArtifactNotFound:
            raise CheckpointNotFound(
                f"no checkpoint {checkpoint}", field="checkpoint", hint="List the run's checkpoints."
            ) from None
        except StoreUnavailable:
            if checkpoint not in self._known:
                raise
            return self._known[checkpoint]
        self._known[checkpoint] = found
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    async def test_set(self, checkpoint: str) -> str:
        """Digest of the test set that a checkpoint was judged on; empty when it is not known.

        Two datasets whose test parts hold the same rows have the same, whatever they train on.

        Raises:
            CheckpointNotFound, StoreUnavailable: as :meth:`get`.
        """
        manifest = await self.get(checkpoint)
        if not manifest.dataset:
            return manifest.dataset_digest
        if manifest.dataset not in self._test_sets:
            try:
                dataset = await self._artifacts.manifest(manifest.dataset, DatasetManifest)
            except ArtifactNotFound:  # deleted since
                return manifest.dataset_digest
            shards = sorted(file.sha256 for file in dataset.files if file.path.startswith("test"))
            self._test_sets[manifest.dataset] = hashlib.sha256("".join(shards).encode()).hexdigest()
            if len(self._test_sets) > _REMEMBERED:
                self._test_sets.popitem(last=False)
        return self._test_sets[manifest.dataset]
