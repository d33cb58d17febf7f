"""Artifacts: immutable sets of files with a manifest (snapshots, datasets, adapters).

The files are blobs; the manifest ``<name>/manifest.json`` is written last and only when the name is free. A name
therefore either has its whole artifact or does not exist, whatever fails in between.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from services.core import log
from services.core.errors import (
    ArtifactNotFound,
    DigestMismatch,
    InvalidArgument,
    ObjectNotFound,
    ResourceExists,
)
from services.core.store.blobs import Blobs, digest_of
from services.core.store.store import ObjectStore

CONCURRENT = 8
"""Files of one artifact on the way at once."""

M = TypeVar("M", bound=Message)
Item = TypeVar("Item")
Result = TypeVar("Result")
logger = log.get(__name__)


class _Manifest(Protocol):
    files: RepeatedCompositeFieldContainer[ArtifactFile]


class Artifacts:
    """Commits and fetches artifacts; fetched files are kept in ``cache_dir``, which several processes may share."""

    def __init__(self, store: ObjectStore, cache_dir: Path) -> None:
        self._store = store
        self._blobs = Blobs(store)
        self._cache = cache_dir / "artifacts"

    async def commit(self, name: str, manifest: Message, files: Mapping[str, Path | bytes]) -> list[ArtifactFile]:
        """Stores the files, then the manifest. Repeating it with the same content changes nothing.

        Args:
            name: resource name of the artifact.
            manifest: a message with ``repeated ArtifactFile files``, which is filled in here, sorted by path.
            files: paths within the artifact, with their content.

        Raises:
            ResourceExists: the name belongs to an artifact with other content.
            InvalidArgument: a path is not relative and plain.
        """
        _check_paths(list(files))
        stored = await _bounded(lambda path: self._store_file(path, files[path]), sorted(files))
        container = cast(_Manifest, manifest).files
        del container[:]
        container.extend(stored)
        # Readable field names, sorted keys: the same manifest is the same bytes.
        text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, sort_keys=True)
        if not await self._store.put(_manifest_key(name), text.encode(), if_absent=True):
            there = await self.manifest(name, type(manifest))
            if there != manifest:
                raise ResourceExists(
                    f"{name} exists with other content",
                    field="name",
                    hint="Artifacts never change: commit the new content under a name of its own.",
                    name=name,
                )
        return stored

    async def manifest(self, name: str, message_type: type[M]) -> M:
        """The manifest of a committed artifact.

        Raises:
            ArtifactNotFound: no artifact of that name was committed.
            DigestMismatch: the stored manifest is no such message.
        """
        try:
            text = await self._store.get(_manifest_key(name))
        except ObjectNotFound:
            raise ArtifactNotFound(f"no artifact {name!r}", field="name", name=name) from None
        try:
            # A newer release may have written fields that this one does not know.
            return json_format.Parse(text, message_type(), ignore_unknown_fields=True)
        except (json_format.ParseError, UnicodeDecodeError) as error:
            raise DigestMismatch(
                f"the manifest of {name!r} is damaged: {error}", hint="Restore that object.", name=name
            ) from None

    async def fetch(self, name: str, files: Sequence[ArtifactFile], only: Sequence[str] = ()) -> Path:
        """Brings files of an artifact into the local cache and returns the folder in which they lie by their paths.

        Every file is verified, also one that was cached before; a damaged one is fetched again. Callers must not
        change the files.

        Args:
            name: resource name of the artifact, for messages.
            files: the manifest's files.
            only: paths of those wanted; empty for all.

        Raises:
            ObjectNotFound: a blob is gone.
            DigestMismatch: a stored blob has another digest.
            InvalidArgument: ``only`` names a path that the artifact does not have, or a path is unsafe.
        """
        by_path = {file.path: file for file in files}
        _check_paths([file.path for file in files])
        if unknown := sorted(set(only) - by_path.keys()):
            raise InvalidArgument(
                f"{name} has no file {unknown[0]!r}", field="only", hint=f"It has {', '.join(sorted(by_path)[:20])}."
            )
        folder = self._cache / _listing_digest(by_path)
        wanted = [by_path[path] for path in only or by_path]
        await _bounded(lambda file: self._fetch_file(name, file, folder / file.path), wanted)
        return folder

    async def _store_file(self, path: str, content: Path | bytes) -> ArtifactFile:
        if isinstance(content, bytes):
            return ArtifactFile(path=path, sha256=await self._blobs.put(content), size=len(content))
        sha256, size = await self._blobs.put_file(content)
        return ArtifactFile(path=path, sha256=sha256, size=size)

    async def _fetch_file(self, name: str, file: ArtifactFile, to: Path) -> None:
        try:
            found = await asyncio.to_thread(digest_of, to)
        except FileNotFoundError:
            found = ""
        if found == file.sha256:
            return
        if found:
            logger.warning("cached file is damaged, fetching it again", artifact=name, path=file.path)
        await self._blobs.get_file(file.sha256, to)


async def _bounded(call: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """Calls for every item, a few at a time; the first failure stops the others and is raised as it is."""
    limit = asyncio.Semaphore(CONCURRENT)

    async def one(item: Item) -> Result:
        async with limit:
            return await call(item)

    running = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _manifest_key(name: str) -> str:
    return f"{name}/manifest.json"


def _check_paths(paths: Sequence[str]) -> None:
    """Refuses paths that would leave the artifact's folder or stand in each other's way."""
    seen: set[str] = set()
    for path in sorted(paths):
        parts = path.split("/")
        unsafe = "\\" in path or "\0" in path or any(part in {"", ".", ".."} for part in parts)
        below_a_file = any(str(parent) in seen for parent in PurePosixPath(path).parents)
        if unsafe or below_a_file or path in seen:
            raise InvalidArgument(
                f"{path[:200]!r} cannot be a path within an artifact",
                field="files.path",
                hint="Use unique relative paths with forward slashes, without '.' and '..' parts.",
            )
        seen.add(path)


def _listing_digest(files: Mapping[str, ArtifactFile]) -> str:
    listing = "".join(f"{files[path].sha256} {path}\0" for path in sorted(files))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
