"""Content to upload: a file or bytes, with its digest, read in chunks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from codegraft.common.v1.artifact_pb2 import ArtifactFile, FileChunk
from services.core.errors import InvalidArgument

CHUNK = 1 << 20
"""Bytes per message: well under gRPC's default limit of 4 MiB."""
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "merges.txt", "*.jinja")
"""What of a model's folder is sent."""


@dataclass(frozen=True, slots=True)
class Content:
    """What an upload sends. Make it with :meth:`of`."""

    origin: Path | bytes
    filename: str
    size: int
    """In bytes."""
    sha256: str
    """64 hexadecimal digits."""

    @classmethod
    def of(cls, origin: str | Path | bytes, filename: str = "") -> Content:
        """Measures a file (by its path) or bytes.

        Raises:
            InvalidArgument: the file cannot be read.
        """
        if isinstance(origin, bytes):
            return cls(origin, filename, len(origin), hashlib.sha256(origin).hexdigest())
        path = Path(origin)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return cls(path, filename or path.name, file.tell(), digest)
        except OSError as error:
            raise InvalidArgument(
                f"{path} cannot be read: {error.strerror}", field="path", hint="Give a readable file."
            ) from error

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes as a file."""
        if isinstance(self.origin, bytes):
            yield io.BytesIO(self.origin)
        else:
            with self.origin.open("rb") as file:
                yield file

    def chunks(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) from the offset on."""
        with self.open() as file:
            file.seek(offset)
            while data := file.read(CHUNK):
                yield offset, data
                offset += len(data)


def measured(folder: Path, patterns: Sequence[str]) -> list[Content]:
    """The files of a folder that match one of the patterns, by name; hidden ones are left out.

    Raises:
        InvalidArgument: one cannot be read, or there is none.
    """
    paths = {path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")}
    if not paths:
        raise InvalidArgument(
            f"{folder} has no {' or '.join(patterns)}", field="path", hint="Give the folder that holds the files."
        )
    return [Content.of(path) for path in sorted(paths)]


def announced(contents: Sequence[Content]) -> list[ArtifactFile]:
    """The files as an upload's header tells of them."""
    return [ArtifactFile(path=each.filename, sha256=each.sha256, size=each.size) for each in contents]


def chunks(contents: Sequence[Content]) -> Iterator[FileChunk]:
    """The bytes of all files, as if they lay one behind the other."""
    begin = 0
    for content in contents:
        for offset, data in content.chunks(0):
            yield FileChunk(offset=begin + offset, data=data)
        begin += content.size
