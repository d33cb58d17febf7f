"""Models in the object store, for places without the Internet: put there once, verified by everyone who fetches one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from fnmatch import fnmatch
from pathlib import Path

from codegraft.trainer.v1.model_pb2 import ModelManifest
from services.core.errors import ArtifactNotFound, DigestMismatch, InvalidName, ModelNotFound
from services.core.models import catalogue, weights
from services.core.models.spec import ModelSpec, StoreSource
from services.core.store import Artifacts, ObjectStore

PREFIX = "models/"
"""Of their artifacts' names."""


def artifact_name(name: str, field: str = "name") -> str:
    """The artifact's name of a model's.

    Raises:
        InvalidName: it is none; names the field.
    """
    if not catalogue.STORE_NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:80]!r} is not a valid name of a model",
            field=field,
            hint="Use 1 to 64 lower-case letters, digits, hyphens and dots, with a letter or digit at both ends.",
        )
    return PREFIX + name


def is_model_file(path: str) -> bool:
    """Whether a file of that plain name belongs to a model: no pickles, no code, nothing hidden."""
    plain = path and not path.startswith(".") and not set(path) & set("/\\\0")
    return bool(plain) and any(fnmatch(path, pattern) for pattern in weights.MODEL_FILES)


async def manifest(name: str, artifacts: Artifacts) -> ModelManifest:
    """What the store says of a model.

    Raises:
        ModelNotFound: it has none of that name.
    """
    try:
        return await artifacts.manifest(artifact_name(name), ModelManifest)
    except ArtifactNotFound:
        raise ModelNotFound(
            f"the object store has no model {name!r}",
            field="model",
            hint=f"Put it there: codegraft models push DIR {name}",
            model=f"store:{name}",
        ) from None


async def names(store: ObjectStore) -> AsyncIterator[str]:
    """The names of the models in the store."""
    async for key in store.list(PREFIX):
        name, _, file = key.removeprefix(PREFIX).rpartition("/")
        if file == "manifest.json":
            yield name


async def bring(spec: ModelSpec, cache_dir: Path, artifacts: Artifacts) -> None:
    """Brings a model of the store into the cache, where ``weights.ensure_weights`` finds it; leaves other models alone.

    What is here already is taken as it is: a model in the store never changes.

    Raises:
        ModelNotFound: the store has no such model.
        DigestMismatch: what came is not what was put there.
        StoreUnavailable: the store does not answer.
    """
    if not isinstance(spec.source, StoreSource) or weights.is_cached(spec, cache_dir):
        return
    wanted = await manifest(spec.source.name, artifacts)
    fetched = await artifacts.fetch(wanted.name, wanted.files)

    def link(to: Path) -> None:
        for file in wanted.files:
            os.link(fetched / file.path, to / file.path)  # the same cache, so the same disk
        if weights.base_digest(to) != wanted.digest:
            raise DigestMismatch(
                f"{spec.id} has the digest {weights.base_digest(to)}, not {wanted.digest}",
                hint="Push it again under another name.",
            )

    await asyncio.to_thread(weights.make_once, weights.stored_folder(spec, cache_dir), link)
