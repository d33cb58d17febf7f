"""An adapter that was trained elsewhere on its way in: received, checked as serving would check it, and made a run."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED
from codegraft.trainer.v1.adapter_pb2 import ImportHeader
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.core import arrival, names
from services.core.auth.caller import current
from services.core.errors import (
    AdapterRejected,
    BaseModelMismatch,
    InvalidArgument,
    LimitExceeded,
    RequestIdReused,
    ResourceExists,
)
from services.core.jobs import new_status
from services.core.jobs.states import advance
from services.core.models import adapter_files, catalogue, stored, weights
from services.core.models.adapter_files import CONFIG, WEIGHTS
from services.core.models.catalogue import ModelSpec
from services.core.runtime import Runtime
from services.trainer.config import TrainerSettings
from services.trainer.planning.settings import RANGES
from services.trainer.records import Tables

STEP = 0
"""Of the one checkpoint: no optimizer step was taken here."""
_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = int(RANGES["lora_r"][1])
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Importer:
    """Imports adapters."""

    def __init__(self, runtime: Runtime, settings: TrainerSettings, tables: Tables) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables

    async def receive(self, header: ImportHeader, chunks: AsyncIterator[tuple[int, bytes]]) -> Run:
        """The run that holds the adapter.

        Args:
            chunks: (position, bytes) of the files, in the header's order.

        Raises:
            InvalidArgument: a file that is not taken, or a field that is none.
            LimitExceeded: a file is too large.
            UploadMismatch: the bytes are not those announced.
            AdapterRejected, BaseModelMismatch: it does not fit the base model, or is not plain LoRA.
            RequestIdReused: the request came before with other files.
            QuotaExceeded: the project has no room for it.
            ModelNotFound, StoreUnavailable, StateUnavailable.
        """
        names.parse(names.PROJECT, header.parent, field="header.parent")
        spec = catalogue.find(header.base_model or self._settings.trainer_model)
        self._check_files(list(header.files))
        run_id = names.new_id("r", request_id=header.request_id, scope=header.parent)
        name = f"{header.parent}/runs/{run_id}"
        if (there := await self._tables.runs.find(name)) is not None:
            return await self._again(there, header, spec)
        checkpoint, size = f"{name}/checkpoints/{STEP}", sum(file.size for file in header.files)
        async with self._runtime.storage.claim([header.parent], checkpoint, size):
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="codegraft-import-"))
            try:
                await arrival.receive(header.files, chunks, folder)
                await stored.bring(spec, self._settings.cache_dir, self._runtime.artifacts)
                base = await asyncio.to_thread(weights.ensure_weights, spec, self._settings.cache_dir)
                manifest = await asyncio.to_thread(_verified, folder, base, spec, checkpoint)
                return await self._keep(name, header, manifest, folder)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _check_files(self, files: list[ArtifactFile]) -> None:
        limits = {WEIGHTS: self._settings.trainer_max_adapter_bytes, CONFIG: _MAX_CONFIG_BYTES}
        for file in files:
            if file.path.endswith(_PICKLES):
                raise InvalidArgument(
                    f"{file.path[:200]!r} is a pickle, which is never read",
                    field="header.files",
                    hint="Save the adapter as safetensors (PEFT: save_pretrained with safe_serialization).",
                )
            if file.path not in limits:
                raise InvalidArgument(
                    f"{file.path[:200]!r} is no file of an adapter",
                    field="header.files",
                    hint=f"Send {WEIGHTS} and {CONFIG}, nothing else.",
                )
            if not 0 < file.size <= limits[file.path]:
                raise LimitExceeded(
                    f"{file.path} has {file.size:,} bytes; 1 to {limits[file.path]:,} are taken",
                    field="header.files",
                    hint="For weights CODEGRAFT_TRAINER_MAX_ADAPTER_BYTES is the limit.",
                )
            if not _SHA256.fullmatch(file.sha256):
                raise InvalidArgument(
                    f"{file.sha256[:80]!r} is no SHA-256",
                    field="header.files",
                    hint="Give 64 lower-case hexadecimal digits.",
                )
        if sorted(file.path for file in files) != sorted(limits):
            raise InvalidArgument(
                f"an adapter is {WEIGHTS} and {CONFIG}, each once", field="header.files", hint="Send both."
            )

    async def _keep(self, name: str, header: ImportHeader, manifest: AdapterManifest, folder: Path) -> Run:
        """Artifact, then the checkpoint's record, then the run's: whoever sees the run finds all of it."""
        files = {file.path: folder / file.path for file in header.files}
        try:
            await self._runtime.artifacts.commit(manifest.name, manifest, dict(files))
            checkpoint = Checkpoint(
                name=manifest.name,
                step=STEP,
                sha256=manifest.sha256,
                base_model=manifest.base_model,
                base_digest=manifest.base_digest,
                size=sum(file.size for file in header.files),
            )
            checkpoint.create_time.GetCurrentTime()
            with contextlib.suppress(ResourceExists):  # of a call that broke off behind it
                await self._tables.checkpoints.create(checkpoint)
            event = RunEvent(sequence=1, checkpoint=await self._tables.checkpoints.get(manifest.name))
            event.time.GetCurrentTime()
            await self._tables.story.write(name, event, 0)
            run = Run(
                name=name,
                base_model=manifest.base_model,
                title=header.title,
                request_id=header.request_id,
                status=new_status(),
                last_sequence=event.sequence,
                imported=True,
                creator=current().subject,
            )
            advance(run.status, JOB_STATE_RUNNING)
            advance(run.status, JOB_STATE_SUCCEEDED)
            return await self._tables.runs.create(run)
        except ResourceExists:  # the same request, at the same time or before with other files
            there = await self._tables.runs.find(name)
            if there is None:
                raise _reused(header.request_id) from None
            return await self._again(there, header, catalogue.find(manifest.base_model))

    async def _again(self, there: Run, header: ImportHeader, spec: ModelSpec) -> Run:
        """The run that the same request made before."""
        if there.imported and there.title == header.title and there.base_model == spec.id:
            manifest = await self._runtime.artifacts.manifest(f"{there.name}/checkpoints/{STEP}", AdapterManifest)
            if {(f.path, f.sha256) for f in manifest.files} == {(f.path, f.sha256) for f in header.files}:
                return there
        raise _reused(header.request_id)


def _reused(request_id: str) -> RequestIdReused:
    return RequestIdReused(
        f"request_id {request_id!r} came before with another request",
        field="header.request_id",
        hint="Use a new request_id for a new request.",
    )


def _verified(folder: Path, base: Path, spec: ModelSpec, name: str) -> AdapterManifest:
    """The manifest of an adapter that fits the base model. Needs torch; runs in a thread."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = adapter_files.read_config(folder / CONFIG, "the adapter")
    if config.rank > _MAX_RANK:
        raise AdapterRejected(f"the adapter has rank {config.rank}; 1 to {_MAX_RANK} are possible")
    _check_base(config.base_model, spec)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterRejected(f"{WEIGHTS} is no safetensors file: {error}", hint="Save the adapter again.") from None
    pairs = adapter_files.pair_up(
        tensors,
        name="the adapter",
        rank=config.rank,
        layers=adapter_files.linear_layers(base),
        base_model=spec.id,
    )
    return AdapterManifest(
        name=name,
        sha256=adapter_files.version(folder),
        base_model=spec.id,
        base_digest=weights.base_digest(base),
        lora_r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted({path.rpartition(".")[2] for path in pairs}),
        step=STEP,
    )


def _check_base(claimed: str, spec: ModelSpec) -> None:
    """Two models may have the same shapes; where both are of the catalogue, the adapter has to be this one's."""
    known = catalogue.known(claimed)
    if known is not None and catalogue.known(spec.id) is not None and known is not spec:
        raise BaseModelMismatch(
            f"the adapter says that it was trained on {claimed}, which is not {spec.id}",
            field="header.base_model",
            hint=f"Import it for the model {known.id}.",
        )
