"""A checkpoint on its way out: as it is, merged into its base model, or as one GGUF file."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from codegraft.common.v1.job_pb2 import Progress
from codegraft.trainer.v1.adapter_pb2 import ADAPTER_FORMAT_GGUF, ADAPTER_FORMAT_PEFT, AdapterFormat, GgufType
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import ArtifactNotFound, BaseModelMismatch, CheckpointNotFound, InvalidArgument
from services.core.models import catalogue, stored, weights
from services.core.models.adapter_files import CONFIG, WEIGHTS
from services.core.store import Artifacts
from services.core.store.blobs import digest_of

if TYPE_CHECKING:
    from services.trainer.adapters.merge import Meter

CHUNK = 1 << 20
"""Bytes per message: well under gRPC's default limit of 4 MiB."""
_TELL_SECONDS = 0.5
_STALE_SECONDS = 86_400.0
"""Age of a conversion's folder from which it is a killed process's."""


class Exporter:
    """Makes exports. Only one conversion runs at a time: each takes all the cores and gigabytes of disk.

    Args:
        cache_dir: conversions lie in ``exports/`` in it while they are downloaded.
    """

    def __init__(self, artifacts: Artifacts, cache_dir: Path) -> None:
        self.artifacts = artifacts
        self.cache_dir = cache_dir
        self.turn = asyncio.Lock()

    def begin(self, checkpoint: str, format: AdapterFormat, gguf_type: GgufType) -> Export:
        """An export, to be used in ``async with``."""
        if format not in AdapterFormat.values() or not format:
            raise InvalidArgument("format is not set", field="format", hint="Ask for PEFT, MERGED or GGUF.")
        return Export(self, checkpoint, format, gguf_type)


class Export:
    """One checkpoint's files: first :meth:`make`, then :attr:`manifest`, :attr:`files` and :meth:`chunks`.

    Leaving it stops a conversion and removes what it made.
    """

    def __init__(self, exporter: Exporter, checkpoint: str, format: AdapterFormat, gguf_type: GgufType) -> None:
        self._exporter = exporter
        self._checkpoint = checkpoint
        self._format = format
        self._gguf_type = gguf_type
        self._own: Path | None = None
        self._stop: Callable[[], None] = lambda: None
        self._conversion: asyncio.Future[None] | None = None
        self.manifest = AdapterManifest()
        self.folder = Path()
        """Where the files lie."""
        self.files: list[ArtifactFile] = []

    async def __aenter__(self) -> Export:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._conversion is not None:
            # Its thread cannot be stopped from outside, and must not write into a folder that is being removed.
            await asyncio.wait({self._conversion})
            if not self._conversion.cancelled():
                self._conversion.exception()  # who left does not want to know; unasked, asyncio would complain
        if self._own is not None:
            await asyncio.to_thread(shutil.rmtree, self._own, ignore_errors=True)

    async def make(self) -> AsyncGenerator[Progress]:
        """Fetches, and converts where that is asked for; tells how far it is now and then.

        Raises:
            CheckpointNotFound: there is none of that name.
            BaseModelMismatch: the base model here is not the one that it was trained on.
            NotSupported: the model cannot be converted so.
            ResourceExhausted: the disk has no room.
            ModelNotFound, DigestMismatch, StoreUnavailable.
        """
        artifacts = self._exporter.artifacts
        try:
            self.manifest = await artifacts.manifest(self._checkpoint, AdapterManifest)
        except ArtifactNotFound:
            raise CheckpointNotFound(
                f"no checkpoint {self._checkpoint}", field="name", hint="List the run's checkpoints."
            ) from None
        adapter = await artifacts.fetch(self._checkpoint, self.manifest.files, only=(WEIGHTS, CONFIG))
        if self._format == ADAPTER_FORMAT_PEFT:
            self.folder = adapter
            self.files = [file for file in self.manifest.files if file.path in (WEIGHTS, CONFIG)]
            return
        spec = catalogue.find(self.manifest.base_model)
        await stored.bring(spec, self._exporter.cache_dir, artifacts)
        base = await asyncio.to_thread(weights.ensure_weights, spec, self._exporter.cache_dir)
        from services.trainer.adapters.merge import Meter  # imports torch

        meter = Meter()
        self._stop = meter.stop
        while self._exporter.turn.locked():
            yield _progress(meter)
            await asyncio.sleep(_TELL_SECONDS)
        async with self._exporter.turn:
            self._own = await asyncio.to_thread(_folder, self._exporter.cache_dir / "exports")
            self._conversion = asyncio.ensure_future(
                asyncio.to_thread(self._convert, base, adapter, self._own, spec.title, meter)
            )
            while not self._conversion.done():
                yield _progress(meter)
                await asyncio.wait({self._conversion}, timeout=_TELL_SECONDS)
            await self._conversion
        self.folder = self._own

    async def chunks(self, offset: int) -> AsyncGenerator[tuple[int, bytes]]:
        """(position, bytes) of the files as if they lay one behind the other; a chunk is of one file only."""
        begin = 0
        for described in self.files:
            end = begin + described.size
            if offset < end:
                with (self.folder / described.path).open("rb") as file:
                    file.seek(offset - begin)
                    while offset < end and (data := await asyncio.to_thread(file.read, CHUNK)):
                        yield offset, data
                        offset += len(data)
            begin = end

    def _convert(self, base: Path, adapter: Path, to: Path, title: str, meter: Meter) -> None:
        from services.trainer.adapters import gguf_file
        from services.trainer.adapters.merge import Merged

        meter.begin("reading the adapter", 0)
        if weights.base_digest(base) != self.manifest.base_digest:
            raise BaseModelMismatch(
                f"{self._checkpoint} was trained on other weights of {self.manifest.base_model} than are here",
                hint="Restore the model's weights, or download the adapter as PEFT.",
            )
        merged = Merged(base, adapter, self._checkpoint)
        if self._format == ADAPTER_FORMAT_GGUF:
            gguf_file.write(merged, to, f"{title} + {self.manifest.sha256[:12]}", self._gguf_type, meter)
        else:
            merged.write(to, meter)
        made = sorted(to.iterdir())
        meter.begin("computing digests", sum(path.stat().st_size for path in made))
        for path in made:
            self.files.append(ArtifactFile(path=path.name, sha256=digest_of(path), size=path.stat().st_size))
            meter.advance(path.stat().st_size)


def _progress(meter: Meter) -> Progress:
    return Progress(done=meter.done, total=meter.total, unit="bytes", message=meter.phase)


def _folder(parent: Path) -> Path:
    """A new folder, after those that a killed process left were removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent))
