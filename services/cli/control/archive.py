"""The file of a backup: a gzipped tar with a table of contents that has the digest of every part.

    manifest.json           format, release, when, and the parts with their digests
    kv/<bucket>.jsonl       the records of one bucket: {"key": …, "value": base64 of the stored protobuf}
    kv/access.jsonl.sealed  the same of the API keys, encrypted with the backup's key (Fernet)
    streams/<name>.jsonl    the messages of a stream: {"subject": …, "id": …, "data": base64}
    artifacts.jsonl         the artifacts in the object store: {"name": …, "sha256": …, "files": [[digest, size], …]}

Any program can read it. Nothing is extracted by a name that the file gives.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from services.core.errors import DigestMismatch, FailedPrecondition, InvalidArgument

FORMAT = 1
MANIFEST = "manifest.json"
ARTIFACTS = "artifacts.jsonl"
SEALED = ".sealed"


@dataclass(frozen=True, slots=True)
class Record:
    """One key of a bucket."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a stream."""

    subject: str
    id: str
    """What tells it from a repetition (Nats-Msg-Id)."""
    data: bytes
    reason: str = ""
    """Why a dead letter is one."""


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact as the object store had it."""

    name: str
    sha256: str
    """Of its manifest."""
    files: Sequence[tuple[str, int]]
    """(SHA-256, bytes) of its files, each a blob."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the file, in its table of contents."""

    name: str
    records: int
    size: int
    """In bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """The table of contents."""

    created: str
    """ISO 8601."""
    release: str
    """Of the command that wrote it."""
    parts: Sequence[Part]
    left_out: Sequence[str]
    """What is not in it, and why, for people."""


def records_to_lines(records: Iterable[Record]) -> bytes:
    """The records, one JSON value a line."""
    return _lines({"key": one.key, "value": _encoded(one.value)} for one in records)


def records_of(lines: bytes) -> list[Record]:
    """The inverse of :func:`records_to_lines`."""
    return [Record(one["key"], base64.b64decode(one["value"])) for one in _values(lines)]


def messages_to_lines(messages: Iterable[Message]) -> bytes:
    """The messages, one JSON value a line."""
    return _lines(
        {"subject": one.subject, "id": one.id, "data": _encoded(one.data), "reason": one.reason} for one in messages
    )


def messages_of(lines: bytes) -> list[Message]:
    """The inverse of :func:`messages_to_lines`."""
    return [
        Message(one["subject"], one["id"], base64.b64decode(one["data"]), one.get("reason", ""))
        for one in _values(lines)
    ]


def artifacts_to_lines(artifacts: Iterable[StoredArtifact]) -> bytes:
    """The artifacts, one JSON value a line."""
    return _lines(asdict(one) for one in artifacts)


def artifacts_of(lines: bytes) -> list[StoredArtifact]:
    """The inverse of :func:`artifacts_to_lines`."""
    return [
        StoredArtifact(one["name"], one["sha256"], [(sha256, size) for sha256, size in one["files"]])
        for one in _values(lines)
    ]


def seal(data: bytes, key: str) -> bytes:
    """Encrypts a part.

    Raises:
        InvalidArgument: that is no Fernet key.
    """
    return _fernet(key).encrypt(data)


def unseal(data: bytes, key: str) -> bytes:
    """Decrypts a part.

    Raises:
        InvalidArgument: that is no Fernet key, or not the one.
    """
    try:
        return _fernet(key).decrypt(data)
    except InvalidToken:
        raise InvalidArgument(
            "the API keys in the backup were encrypted with another key",
            field="--key-file",
            hint="Give the key with which it was made, or none: then the API keys are left as they are.",
        ) from None


def write(
    path: Path, *, created: str, release: str, parts: Mapping[str, tuple[int, bytes]], left_out: Sequence[str]
) -> Contents:
    """Writes the file, which appears as a whole or not at all, readable by its owner only.

    Args:
        parts: by name: how many records, and the bytes.

    Raises:
        FailedPrecondition: it cannot be written.
    """
    table = [
        Part(name, records, len(data), hashlib.sha256(data).hexdigest()) for name, (records, data) in parts.items()
    ]
    contents = Contents(created, release, table, list(left_out))
    head = json.dumps({"format": FORMAT, **asdict(contents)}, indent=2).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with (
            os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for name, data in ((MANIFEST, head), *((name, data) for name, (_, data) in parts.items())):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o600
                tar.addfile(member, io.BytesIO(data))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FailedPrecondition(
            f"{path} cannot be written: {error.strerror}", field="FILE", hint="Choose another place."
        ) from None
    return contents


def read(path: Path) -> tuple[Contents, dict[str, bytes]]:
    """The table of contents, and the bytes of every part in it, verified.

    Raises:
        InvalidArgument: there is no such file, it is no backup, or of a format that this release does not know.
        DigestMismatch: it is damaged.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            found = {member.name: member for member in tar.getmembers() if member.isreg()}
            head: dict[str, Any] = json.loads(_bytes(tar, found[MANIFEST]))
            if head["format"] != FORMAT:
                raise InvalidArgument(
                    f"{path} has format {head['format']}, this release reads {FORMAT}",
                    field="FILE",
                    hint=f"Restore it with codegraft {head.get('release', 'of a newer release')}.",
                )
            table = [Part(**part) for part in head["parts"]]
            data = {part.name: _bytes(tar, found[part.name]) for part in table}
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise InvalidArgument(f"{path} cannot be read: {error.strerror}", field="FILE") from None
        raise _damaged(path, str(error)) from None
    except (tarfile.TarError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    for part in table:
        if len(data[part.name]) != part.size or hashlib.sha256(data[part.name]).hexdigest() != part.sha256:
            raise _damaged(path, f"the part {part.name} has another digest")
    return Contents(head["created"], head["release"], table, head["left_out"]), data


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _damaged(path: Path, why: str) -> DigestMismatch:
    return DigestMismatch(
        f"{path} is damaged, or no backup of codegraft: {why}", field="FILE", hint="Take another copy of it."
    )


def _fernet(key: str) -> Fernet:
    try:
        return Fernet(key.strip())
    except (ValueError, binascii.Error):
        raise InvalidArgument(
            "that is no key for a backup", field="--key-file", hint="Make one with `codegraft credential new-key`."
        ) from None


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _lines(values: Iterable[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _values(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]
