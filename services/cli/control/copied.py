"""Reads the copies of records in the object store, and what else has to be known to bring these records back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence

from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from services.cli.control import copies
from services.cli.control.copies import Copies
from services.cli.control.installation import Control
from services.core.errors import NotFound, ObjectNotFound
from services.core.state import Table, mirror
from services.core.store import blobs


async def read(control: Control) -> Copies:
    """All copies in the store."""
    return copies.read([one async for one in _in(control)])


async def _in(control: Control) -> AsyncIterator[tuple[str, bytes]]:
    async for key in control.store.list(mirror.ROOT):
        with contextlib.suppress(ObjectNotFound):  # it went meanwhile
            yield key, await control.store.get(key)


async def uploads(control: Control, sources: Iterable[Source]) -> tuple[list[Upload], list[str]]:
    """The uploads that sources are made of, as far as the store has their content; and the names of the others.

    File names are lost, which are for people only.
    """
    made: dict[str, Upload] = {}
    lost: set[str] = set()
    for source in sources:
        name = copies.upload_of(source)
        if not name or name in made or name in lost:
            continue
        sha256 = name.rpartition("/")[2]
        content = await control.store.stat(blobs.key(sha256))
        if content is None:
            lost.add(name)
            continue
        size, creator = content.size, source.creator
        made[name] = Upload(name=name, sha256=sha256, size=size, offset=size, complete=True, creator=creator)
        made[name].complete_time.FromDatetime(content.modified)
    return list(made.values()), sorted(lost)


async def lost_credentials(control: Control, sources: Sequence[Source]) -> list[str]:
    """Credentials that sources name and that are not there. Nothing brings them back."""
    named = sorted({source.git.credential for source in sources} - {""})
    if not named or not await control.has_bucket("ingest"):
        return named
    table = Table(control.state("ingest"), StoredCredential, missing=NotFound)
    return [name for name in named if await table.find(name) is None]
