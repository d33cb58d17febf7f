"""``codegraft restore``: the control state of a backup, written into an empty installation."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from nats.js import api

from services.cli.control import archive
from services.cli.control.archive import Message, Record, StoredArtifact
from services.cli.control.backup import BUCKETS, STREAMS, KeyFile, messages_in, read_key, records_in
from services.cli.control.installation import Control, Installation, opened
from services.cli.output import ExitCode, Json, err, print_json, print_table
from services.cli.stack import Data
from services.core.audit.nats import stream_config as audit_config
from services.core.auth.keyring import BUCKET as KEYS
from services.core.errors import FailedPrecondition, ObjectNotFound, ResourceExists, RevisionMismatch
from services.core.jobs.nats import stream_configs
from services.core.nats_connection import translated
from services.core.store import blobs

_AT_ONCE = 16


@dataclass(slots=True)
class Restored:
    """What was written, and what the store lacks."""

    written: dict[str, int] = field(default_factory=dict)
    """Records and messages by part."""
    removed: int = 0
    """Records that the backup does not have; only with --force."""
    keys_left: bool = False
    """The backup has API keys, and no key was given to read them."""
    missing: list[str] = field(default_factory=list)
    """Artifacts that the backup lists and the object store does not have, or has otherwise."""


def restore(
    file: Annotated[Path, typer.Argument(help="File that `codegraft backup` wrote.")],
    key_file: KeyFile = None,
    force: Annotated[bool, typer.Option(help="Write over what is there, and remove what the backup lacks.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Bring the control state of a backup back, into an installation that has none.

    Bring the object store back first, by its own means: whatever the backup lists and the store does not have is told
    at the end (exit code 1). Best with the services stopped; they also take it up while they run. Jobs that ran at the
    time of the backup run again from their last kept state. Keys and passwords of the services come from their Secrets;
    API keys from the backup when --key-file opens them, and those that are there already stay.

    With a cluster, CODEGRAFT_NATS_REPLICAS=3 makes buckets that are not there yet with as many copies.

    Example: codegraft restore codegraft-2026-11-26.tar.gz --key-file backup.key
    """
    contents, parts = archive.read(file)
    done = asyncio.run(_restore(Installation.find(data), parts, read_key(key_file), force=force))
    if json:
        print_json(
            {
                "created": contents.created,
                "written": done.written,
                "removed": done.removed,
                "api_keys_restored": not done.keys_left,
                "missing_artifacts": done.missing,
            }
        )
    else:
        print_table(["PART", "WRITTEN"], list(done.written.items()), empty="")
        err.print(f"restored the control state of {contents.created}")
        if done.removed:
            err.print(f"removed {done.removed} records that the backup does not have")
        if done.keys_left:
            err.print("API keys were left as they are: give --key-file to restore those of the backup")
        for name in done.missing:
            err.print(f"the object store lacks {name}")
    if done.missing:
        raise typer.Exit(ExitCode.FAILED)


async def _restore(installation: Installation, parts: Mapping[str, bytes], key: str, *, force: bool) -> Restored:
    sealed = parts.get(f"kv/{KEYS}.jsonl{archive.SEALED}")
    # Opened before anything is written: a wrong key must not leave half of it done.
    keys = archive.records_of(archive.unseal(sealed, key)) if sealed is not None and key else []
    wanted = {bucket: archive.records_of(parts.get(f"kv/{bucket}.jsonl", b"")) for bucket in BUCKETS}
    done = Restored(keys_left=sealed is not None and not key)
    async with opened(installation) as control:
        there = {bucket: await records_in(control, bucket) for bucket in BUCKETS}
        if not force and (full := [bucket for bucket in BUCKETS if there[bucket]]):
            count = sum(len(records) for records in there.values())
            raise FailedPrecondition(
                f"the installation has {count} records already, in {', '.join(full)}",
                hint="Restore into an empty one, or replace its control state with --force.",
            )
        # Of projects that were deleted since: services would let what comes back go once more.
        for deleted in await control.state(KEYS).keys("DeletedProject/") if await control.has_bucket(KEYS) else []:
            await control.state(KEYS).delete(deleted)
        keys = [record for record in keys if not record.key.startswith("DeletedProject/")]
        for bucket in reversed(BUCKETS):  # what is named comes before what names it
            done.removed += await _put(control, bucket, wanted[bucket], replace=True)
            done.written[f"kv/{bucket}"] = len(wanted[bucket])
        await _put(control, KEYS, keys, replace=False)
        done.written[f"kv/{KEYS}"] = len(keys)
        for stream in STREAMS:
            messages = archive.messages_of(parts.get(f"streams/{stream}.jsonl", b""))
            done.written[f"streams/{stream}"] = await _append(control, stream, messages)
        done.missing = await _missing(control, archive.artifacts_of(parts.get(archive.ARTIFACTS, b"")))
    return done


async def _put(control: Control, bucket: str, wanted: Sequence[Record], *, replace: bool) -> int:
    """Writes the records; with ``replace`` also over others, and removes the rest. Returns how many it removed."""
    state = control.state(bucket)
    there = {one.key: one for one in await state.list()}
    try:
        for record in wanted:
            old = there.get(record.key)
            if old is None:
                await state.create(record.key, record.value)
            elif replace and old.value != record.value:
                await state.update(record.key, record.value, old.revision)
        surplus = there.keys() - {record.key for record in wanted} if replace else set()
        for key in surplus:
            await state.delete(key, there[key].revision)
    except (RevisionMismatch, ResourceExists) as error:
        raise FailedPrecondition(
            f"a service writes to {bucket} meanwhile: {error.message}",
            hint="Stop the services, and repeat it with --force.",
        ) from None
    return len(surplus)


async def _append(control: Control, stream: str, messages: Sequence[Message]) -> int:
    """Appends those messages that the stream does not have. Returns how many."""
    configs = {config.name: config for config in (audit_config(), *stream_configs())}
    await control.nats.ensure_stream(configs[stream])
    there = {message.id for message in await messages_in(control, stream)}
    missing = [message for message in messages if not message.id or message.id not in there]
    for message in missing:
        headers: dict[str, str] = {api.Header.MSG_ID: message.id} if message.id else {}
        if message.reason:
            headers["Codegraft-Reason"] = message.reason
        with translated(f"write to {stream}"):
            await control.nats.js.publish(message.subject, message.data, headers=headers or None)
    return len(missing)


async def _missing(control: Control, artifacts: Sequence[StoredArtifact]) -> list[str]:
    """The artifacts of which the store lacks the manifest or a file."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def is_there(artifact: StoredArtifact) -> bool:
        async with limit:
            try:
                manifest = await control.store.get(f"{artifact.name}/manifest.json")
            except ObjectNotFound:
                return False
            if hashlib.sha256(manifest).hexdigest() != artifact.sha256:
                return False
            for sha256, size in artifact.files:
                if await control.store.size(blobs.key(sha256)) != size:
                    return False
            return True

    found = await asyncio.gather(*(is_there(artifact) for artifact in artifacts))
    return [artifact.name for artifact, there in zip(artifacts, found, strict=True) if not there]
