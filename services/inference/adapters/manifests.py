"""What the store says of checkpoints, remembered: a manifest never changes under its name.

It is remembered on the local disk, too, beside the weights that are kept there: a replica that starts while the store
is away serves what it served before.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
from collections import OrderedDict
from pathlib import Path

from google.protobuf.message import DecodeError

from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core import log
from services.core.errors import ArtifactNotFound, CheckpointNotFound, StoreUnavailable
from services.core.store import Artifacts

_REMEMBERED = 1024
_log = log.get("inference.manifests")


class Manifests:
    """The manifests of checkpoints. All methods belong to one event loop.

    Args:
        folder: where they are remembered over restarts; several replicas may share it. Made when it is not there.
    """

    def __init__(self, artifacts: Artifacts, folder: Path) -> None:
        self._artifacts, self._folder = artifacts, folder
        self._writes: set[asyncio.Task[None]] = set()
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
            if checkpoint in self._known:
                return self._known[checkpoint]
            if (kept := await asyncio.to_thread(self._read, checkpoint)) is None:
                raise
            self._remember(checkpoint, kept)
            return kept
        if found != self._known.get(checkpoint):  # a way back asks for a fresh one, and is in a hurry
            write = asyncio.create_task(asyncio.to_thread(self._write, checkpoint, found.SerializeToString()))
            self._writes.add(write)
            write.add_done_callback(self._writes.discard)
        self._remember(checkpoint, found)
        return found

    def _remember(self, checkpoint: str, manifest: AdapterManifest) -> None:
        self._known[checkpoint] = manifest
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _file(self, checkpoint: str) -> Path:
        return self._folder / hashlib.sha256(checkpoint.encode()).hexdigest()

    def _read(self, checkpoint: str) -> AdapterManifest | None:
        """What the disk remembers; whoever reads the weights holds them against the digest that was asked for."""
        try:
            found = AdapterManifest.FromString(self._file(checkpoint).read_bytes())
        except (OSError, DecodeError):
            return None
        return found if found.name == checkpoint else None

    def _write(self, checkpoint: str, data: bytes) -> None:
        """Remembers one, and forgets the longest unseen beyond as many as are remembered in memory."""
        file = self._file(checkpoint)
        temporary = file.with_suffix(f".{secrets.token_hex(4)}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(file)
            kept = sorted(os.scandir(self._folder), key=lambda entry: entry.stat().st_mtime)
            for entry in kept[:-_REMEMBERED]:
                os.unlink(entry)
        except OSError as error:  # without space, or of a file that another replica has just deleted
            _log.warning("a manifest is not kept on disk", checkpoint=checkpoint, error=str(error))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

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
