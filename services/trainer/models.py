"""Base models as the trainer tells of them, and their way into the object store."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from codegraft.common.v1.model_pb2 import Model
from codegraft.trainer.v1.model_pb2 import ModelHeader, ModelManifest
from services.core import arrival
from services.core.audit import record as audit
from services.core.errors import (
    ArtifactNotFound,
    InvalidArgument,
    LimitExceeded,
    ModelNotFound,
    ResourceExists,
)
from services.core.models import catalogue, memory, stored, weights
from services.core.models.spec import ModelSpec, StoreSource
from services.core.runtime import Runtime
from services.trainer.adapters.disk import check_room
from services.trainer.config import TrainerSettings

_MAX_FILES = 1000


class ModelDesk:
    """Tells of models, and takes new ones."""

    def __init__(self, runtime: Runtime, settings: TrainerSettings) -> None:
        self._runtime = runtime
        self._settings = settings

    async def ids(self) -> list[str]:
        """Ids of the catalogue, then of the object store."""
        there = sorted([f"store:{name}" async for name in stored.names(self._runtime.store)])
        return [spec.id for spec in catalogue.all_models()] + there

    async def get(self, id: str) -> Model:
        """What is known of a model. Raises ModelNotFound."""
        spec = catalogue.find(id or self._settings.trainer_model)
        model = describe(spec)
        if isinstance(spec.source, StoreSource):
            model = (await stored.manifest(spec.source.name, self._runtime.artifacts)).model
        model.cached = weights.is_cached(spec, self._settings.cache_dir)
        return model

    async def push(self, header: ModelHeader, chunks: AsyncIterator[tuple[int, bytes]]) -> Model:
        """Puts a model's folder into the object store.

        Args:
            chunks: (position, bytes) of the files, in the header's order.

        Raises:
            InvalidName: the name is none.
            InvalidArgument: a file is none of a model's.
            LimitExceeded: the files are too large, or too many.
            ResourceExhausted: this machine's disk has no room for them on their way.
            UploadMismatch: the bytes are not those announced.
            ModelNotFound: the files are no model.
            ResourceExists: there is another model of that name.
            StoreUnavailable.
        """
        name = stored.artifact_name(header.name, "header.name")
        self._check(header.files)
        try:
            there = await self._runtime.artifacts.manifest(name, ModelManifest)
        except ArtifactNotFound:
            pass
        else:
            if sorted((f.path, f.sha256) for f in there.files) == sorted((f.path, f.sha256) for f in header.files):
                return there.model
            raise ResourceExists(
                f"the object store has another model {header.name!r}",
                field="header.name",
                hint="Models in the store never change: push this one under a name of its own.",
            )
        spool = self._settings.cache_dir / "incoming"
        await asyncio.to_thread(spool.mkdir, parents=True, exist_ok=True)
        check_room(spool, sum(file.size for file in header.files), "a model on its way to the store")
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=spool))
        try:
            await arrival.receive(header.files, chunks, folder)
            manifest = await asyncio.to_thread(_manifest, folder, header.name, name)
            files = {file.path: folder / file.path for file in header.files}
            await self._runtime.artifacts.commit(name, manifest, dict(files))
            audit.note(name, None, manifest)  # no record of a table says that it is there
            return manifest.model
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _check(self, files: Sequence[ArtifactFile]) -> None:
        paths = [file.path for file in files]
        if strange := [path for path in paths if not stored.is_model_file(path)]:
            raise InvalidArgument(
                f"{strange[0][:200]!r} is no file of a model",
                field="header.files",
                hint=f"Send {', '.join(weights.MODEL_FILES)}: no pickles, no code, no folders.",
            )
        if len(set(paths)) < len(paths):
            raise InvalidArgument("a file is announced twice", field="header.files", hint="Send each once.")
        size, limit = sum(file.size for file in files), self._settings.trainer_max_model_bytes
        if len(files) > _MAX_FILES or any(file.size < 0 for file in files) or size > limit:
            raise LimitExceeded(
                f"{len(files)} files of {size:,} bytes; up to {_MAX_FILES} of {limit:,} are taken",
                field="header.files",
                hint="Raise CODEGRAFT_TRAINER_MAX_MODEL_BYTES.",
            )


def describe(spec: ModelSpec) -> Model:
    """What is known of a model without its weights."""
    served, trained, trained_low = memory.needs(spec)
    return Model(
        id=spec.id,
        title=spec.title,
        functions=[f"MODEL_FUNCTION_{function.name}" for function in sorted(spec.functions)],
        parameters=spec.parameters,
        context_length=spec.context_length,
        lora_targets=spec.lora_targets,
        fim_style=spec.markers.style if spec.markers else "",
        fim_tokens=spec.markers.fim if spec.markers else (),
        stop_tokens=spec.markers.stop if spec.markers else (),
        serving_bytes=served,
        training_bytes=trained,
        low_memory_training_bytes=trained_low,
        licence=spec.licence,
        source=str(spec.source),
    )


def _manifest(folder: Path, name: str, artifact: str) -> ModelManifest:
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ModelNotFound("the folder has no tokenizer", field="header.files", hint="Send its tokenizer.json too.")
    found = catalogue.find(f"dir:{folder.absolute()}")
    spec = replace(found, id=f"store:{name}", title=name, source=StoreSource(name))
    return ModelManifest(name=artifact, digest=weights.base_digest(folder), model=describe(spec))
