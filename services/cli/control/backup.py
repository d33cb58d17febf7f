"""``codegraft backup``: the control state in one file, taken while the services run.

Every bucket is read as it was at one moment, and those that refer to others first: serving names checkpoints, these
runs and datasets, these snapshots. So whatever a record in the file names is in the file too, unless it was deleted
meanwhile. The list of artifacts comes last, because a record names objects and never the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json as jsonlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from services.cli.control import archive
from services.cli.control.archive import Message, Record, StoredArtifact
from services.cli.control.installation import Control, Installation, opened
from services.cli.output import Json, err, print_json, print_table
from services.cli.stack import Data
from services.core.audit.nats import STREAM as AUDIT
from services.core.auth.keyring import BUCKET as KEYS
from services.core.errors import InvalidArgument, ObjectNotFound, StateUnavailable
from services.core.jobs.nats import DEAD_STREAM
from services.core.nats_reader import Interrupted, OrderedReader
from services.core.version import release

BUCKETS = ("inference", "trainer", "scanner", "ingest")
"""In the order in which they are read."""
STREAMS = (AUDIT, DEAD_STREAM)
"""Streams that hold what nothing else tells."""
LEFT_OUT = (
    "what is in the object store (files, datasets, adapters): keep it by its own replication, or mc mirror",
    "the streams JOBS and EVENTS: services queue waiting jobs anew, and learn from records what they missed",
    "the Secrets with the services' keys and passwords, without which stored git credentials stay closed",
)
_AT_ONCE = 16
"""Manifests on their way at once."""
_TRIES = 3

KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="File with the key of the backup (codegraft credential new-key > FILE)."),
]


def backup(
    file: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
    key_file: KeyFile = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Save the control state in one file: projects, sources, scans, runs, policies, audit log, and a list of artifacts.

    Services may run. Objects are not in it: keep those by the object store's own replication, as of a later time than
    the backup. Git credentials go along as they are stored, sealed with the keys of ingest. API keys (of which only
    hashes exist) go along sealed with --key-file, and not at all without it.

    It saves the local stack, or the installation that CODEGRAFT_NATS_URL and the other settings of NATS and S3 name, as
    a NATS user who may read everything (in the chart: operator).

    Example: codegraft backup codegraft-$(date +%F).tar.gz --key-file backup.key
    """
    if file.exists():
        raise InvalidArgument(f"{file} exists", field="FILE", hint="Choose another name, or remove it first.")
    key = read_key(key_file)
    contents = asyncio.run(_backup(Installation.find(data), file, key))
    if json:
        print_json({"file": str(file), **_described(contents)})
        return
    print_table(["PART", "RECORDS", "BYTES"], [[one.name, one.records, one.size] for one in contents.parts], empty="")
    err.print(f"wrote {file} ({file.stat().st_size:,} bytes)")
    for line in contents.left_out:
        err.print(f"  not in it: {line}")


def read_key(path: Path | None) -> str:
    """The key in the file; empty without one.

    Raises:
        InvalidArgument: the file cannot be read.
    """
    if path is None:
        return ""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="--key-file") from None


async def _backup(installation: Installation, file: Path, key: str) -> archive.Contents:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    async with opened(installation) as control:
        parts: dict[str, tuple[int, bytes]] = {}
        left_out = list(LEFT_OUT)
        for bucket in BUCKETS:
            records = await records_in(control, bucket)
            parts[f"kv/{bucket}.jsonl"] = (len(records), archive.records_to_lines(records))
        keys = await records_in(control, KEYS)
        if key:
            sealed = archive.seal(archive.records_to_lines(keys), key)
            parts[f"kv/{KEYS}.jsonl{archive.SEALED}"] = (len(keys), sealed)
        elif keys:
            left_out.append(f"{len(keys)} API keys: give --key-file to have them in it, encrypted")
        for stream in STREAMS:
            messages = await messages_in(control, stream)
            parts[f"streams/{stream}.jsonl"] = (len(messages), archive.messages_to_lines(messages))
        artifacts = await artifacts_in(control)
        parts[archive.ARTIFACTS] = (len(artifacts), archive.artifacts_to_lines(artifacts))
    return archive.write(file, created=created, release=release(), parts=parts, left_out=left_out)


async def records_in(control: Control, bucket: str) -> list[Record]:
    """The records of a bucket; none when it was never made."""
    if not await control.has_bucket(bucket):
        return []
    return [Record(one.key, one.value or b"") for one in await control.state(bucket).list()]


async def messages_in(control: Control, stream: str) -> list[Message]:
    """The messages of a stream, the oldest first; none when it was never made.

    Raises:
        StateUnavailable: reading was interrupted again and again.
    """
    if not await control.has_stream(stream):
        return []
    for _ in range(_TRIES):
        with contextlib.suppress(Interrupted):
            return await _read(control, stream)
    raise StateUnavailable(f"reading the stream {stream} was interrupted again and again", retry_after=1.0)


async def _read(control: Control, stream: str) -> list[Message]:
    found: list[Message] = []
    async with OrderedReader(control.nats, stream, [], after=0) as reader:
        waiting = reader.backlog
        while waiting:
            if (message := await reader.next()) is not None:
                waiting = message.metadata.num_pending
                headers = message.headers or {}
                found.append(
                    Message(
                        message.subject,
                        headers.get("Nats-Msg-Id", ""),
                        message.data,
                        headers.get("Codegraft-Reason", ""),
                    )
                )
    return found


async def artifacts_in(control: Control) -> list[StoredArtifact]:
    """The artifacts of all projects, by name."""
    found = [one async for one in _artifacts(control)]
    return sorted(found, key=lambda artifact: artifact.name)


async def manifests_in(control: Control) -> AsyncIterator[tuple[str, bytes, datetime]]:
    """(name, manifest, when it was stored) of every artifact below a project. One that goes meanwhile is left out."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def fetch(key: str) -> bytes | None:
        async with limit:
            try:
                return await control.store.get(key)
            except ObjectNotFound:
                return None

    keys = [
        (one.key, one.modified)
        async for one in control.store.objects("projects/")
        if one.key.endswith("/manifest.json")
    ]
    for (key, modified), text in zip(keys, await asyncio.gather(*(fetch(key) for key, _ in keys)), strict=True):
        if text is not None:
            yield key.removesuffix("/manifest.json"), text, modified


async def _artifacts(control: Control) -> AsyncIterator[StoredArtifact]:
    async for name, text, _ in manifests_in(control):
        try:
            files = [(file["sha256"], int(file["size"])) for file in jsonlib.loads(text).get("files", [])]
        except (ValueError, KeyError, TypeError, AttributeError):
            files = []  # damaged, which is not ours to mend: its digest is noted all the same
        yield StoredArtifact(name, hashlib.sha256(text).hexdigest(), files)


def _described(contents: archive.Contents) -> dict[str, object]:
    return {
        "created": contents.created,
        "release": contents.release,
        "parts": {one.name: one.records for one in contents.parts},
        "left_out": list(contents.left_out),
    }
