"""Makes parts of scans: examines some files by the rules, or measures the losses of some.

A part depends on its scan, its number and what the plan says of it, and on nothing of this process: see
services/core/jobs/parts.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from codegraft.scanner.v1.scan_pb2 import SECRET_POLICY_IGNORE, Scan
from services.core import log
from services.core.errors import CodegraftError, DigestMismatch, FailedPrecondition, JobCancelled, ObjectNotFound
from services.core.jobs import is_final
from services.core.jobs.parts import parse_part, part_name
from services.core.models import catalogue, stored, weights
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store import Packs, verify
from services.scanner import attributes, examined, pipeline, plan, rules, secrets, snapshot, text
from services.scanner.attributes import Attributes
from services.scanner.config import ScannerSettings
from services.scanner.meter import Meter
from services.scanner.pipeline import Entry
from services.scanner.rules import Rules
from services.scanner.secrets import Finder
from services.scanner.snapshot import File, Snapshot
from services.scanner.stage1 import SourceMasks

KIND = "scan-part"
EXAMINE, MEASURE = "examine", "measure"
"""Phases of a scan."""
EXAMINE_FILES = 512
"""Files of one part of stage 1: less than a second."""
CHUNK = 64
"""Files whose contents are in memory at once."""
MAX_ATTRIBUTES = 1 << 20
"""Bytes of the largest .gitattributes that is read."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all parts of a scan have in common."""

    scan: str
    rules: Rules
    snapshot: Snapshot
    masks: Mapping[str, SourceMasks]
    finder: Finder | None
    packs: Packs
    """A pack has the files of several parts."""


class PartWorker:
    """The handler of parts. Keeps what the parts of the last scan had in common."""

    def __init__(
        self, runtime: Runtime, settings: ScannerSettings, scans: Table[Scan], meter: Meter | None = None
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._scans = scans
        self._meter = meter or Meter(settings)
        self._prepared: Prepared | None = None

    async def make(self, name: str) -> bytes | None:
        """The result of a part; None when its scan has ended.

        Raises:
            JobCancelled: the scan was cancelled meanwhile.
            CodegraftError: the snapshot or the model is not there, or the store is away.
        """
        job, phase, index = parse_part(name)
        scan = await self._scans.find(job)
        if scan is None or is_final(scan.status) or scan.status.cancel_requested:
            return None
        stop = threading.Event()
        watching = asyncio.create_task(self._watch(job, stop))
        try:
            if phase == EXAMINE:
                return await self._examine(await self._prepare(scan), index, stop)
            return await self._measure(scan, index, stop)
        finally:
            stop.set()  # for a thread whose waiter was cancelled
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, job: str, stop: threading.Event) -> None:
        with contextlib.suppress(CodegraftError):
            async for scan in self._scans.watch(job):
                if is_final(scan.status) or scan.status.cancel_requested:
                    break
            stop.set()

    async def _prepare(self, scan: Scan) -> Prepared:
        if self._prepared is None or self._prepared.scan != scan.name:
            manifest = await snapshot.manifest(self._runtime.artifacts, scan.snapshot)
            settled, _ = rules.of_scan(scan, manifest, default_model=self._settings.scanner_model)
            opened = await snapshot.fetch(self._runtime.artifacts, manifest)
            packs = Packs(self._runtime.blobs)
            masks = snapshot.masks(list(manifest.sources), settled)
            for source in manifest.sources:
                if source.honour_gitattributes:
                    found = await self._attributes(opened, source.source, packs)
                    masks[source.source] = replace(masks[source.source], attributes=found)
            finder = None
            if settled.secrets != SECRET_POLICY_IGNORE:
                finder = await asyncio.to_thread(secrets.finder, self._settings.cache_dir)
            self._prepared = Prepared(scan.name, settled, opened, masks, finder, packs)
        return self._prepared

    async def _attributes(self, opened: Snapshot, source: str, packs: Packs) -> Attributes:
        """What the .gitattributes of a source say; one that cannot be read says nothing."""
        texts = {}
        for file in opened.named(source, attributes.FILE):
            if file.size <= MAX_ATTRIBUTES:
                with contextlib.suppress(ObjectNotFound, DigestMismatch):
                    texts[file.path] = (await packs.get(file.place, file.size, file.sha256)).decode(errors="replace")
        return Attributes(texts)

    async def _examine(self, prepared: Prepared, index: int, stop: threading.Event) -> bytes:
        files = prepared.snapshot.files(index * EXAMINE_FILES, (index + 1) * EXAMINE_FILES)
        entries: list[Entry] = []
        signatures: list[bytes | None] = []

        def examine(some: Sequence[File], contents: Sequence[bytes | None]) -> None:
            texts: list[str] = []
            for file, data in zip(some, contents, strict=True):
                if stop.is_set():
                    raise JobCancelled("the scan was cancelled")
                masks = prepared.masks[file.source]
                entry, content = pipeline.examine(file, _verified(file, data), prepared.rules, masks, prepared.finder)
                entries.append(entry)
                texts.append(content)
            signatures.extend(examined.signatures(entries[-len(texts) :], texts))

        for begin in range(0, len(files), CHUNK):
            some = files[begin : begin + CHUNK]
            await asyncio.to_thread(
                examine, some, await self._read(some, prepared.rules.max_file_bytes, prepared.packs)
            )
        return await asyncio.to_thread(examined.to_parquet, entries, signatures, first=index * EXAMINE_FILES)

    async def _read(self, files: Sequence[File], most_bytes: int, packs: Packs) -> list[bytes | None]:
        """The files' contents, yet to be verified; None for those that are too large, or whose pack is damaged."""
        contents: list[bytes | None] = []
        for file in files:  # one after the other: they lie in a few packs, in this order
            data = None
            if file.size <= most_bytes:
                try:
                    data = await packs.get_unverified(file.place, file.size)
                except (ObjectNotFound, DigestMismatch) as error:
                    _warn(file, error)
            contents.append(data)
        return contents

    async def _measure(self, scan: Scan, index: int, stop: threading.Event) -> bytes:
        planned = plan.from_parquet(await self._runtime.store.get(part_name(scan.name, plan.PHASE, 0)))
        settled = rules.resolve(scan.settings, default_model=self._settings.scanner_model)
        spec = catalogue.find(planned.model)
        await stored.bring(spec, self._settings.cache_dir, self._runtime.artifacts)
        folder = await asyncio.to_thread(weights.ensure_weights, spec, self._settings.cache_dir)
        digest = await asyncio.to_thread(weights.base_digest, folder)
        if digest != planned.model_digest:
            raise FailedPrecondition(
                f"this worker's weights of {spec.id} are others than the scan's ({digest[:12]}, "
                f"{planned.model_digest[:12]})",
                hint="Give all scanners the same model, then scan again.",
            )
        packs = Packs(self._runtime.blobs)
        texts: list[tuple[str, str]] = []
        for work in planned.parts[index]:
            try:
                data = await packs.get(work.place, work.size, work.sha256)
            except (ObjectNotFound, DigestMismatch) as error:
                logger.warning("a file cannot be read any more", sha256=work.sha256, error=str(error))
                data = b""
            content = text.decode(data).text
            if work.is_redacted:
                finder = await asyncio.to_thread(secrets.finder, self._settings.cache_dir)
                content = await asyncio.to_thread(finder.redacted, content)
            texts.append((work.text_sha256, content))
        measured = await self._meter.measure(folder, settled, texts, stop)
        return plan.losses_to_parquet(measured)


def _verified(file: File, data: bytes | None) -> bytes | None:
    """A file's content; None when it is damaged."""
    if data is None:
        return None
    try:
        verify(data, file.place, file.sha256)
    except DigestMismatch as error:
        _warn(file, error)
        return None
    return data


def _warn(file: File, error: CodegraftError) -> None:
    logger.warning("a file cannot be read", path=file.path, source=file.source, error=str(error))
