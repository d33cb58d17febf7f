"""The object store as the rest of the house sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store knows of an object."""

    key: str
    size: int
    """In bytes."""
    modified: datetime
    """When it was last written, by the store's clock."""


class ObjectStore(Protocol):
    """Bytes by key in one bucket. Keys are slash-separated, as S3 has them.

    Every method raises :class:`~services.core.errors.StoreUnavailable` when the store does not answer or refuses.
    A reader sees the whole of an object or nothing of it.
    """

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Stores the bytes.

        Args:
            if_absent: store only when the key is free; of many concurrent writers exactly one is told True.

        Returns:
            False when ``if_absent`` and the key was there already; else True.
        """

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file's bytes, of any size, without holding them in memory."""

    async def put_stream(self, key: str, stream: BinaryIO, size: int) -> None:
        """Stores what the stream gives, read in a thread while it is sent on. What the stream raises aborts it all."""

    async def get(self, key: str) -> bytes:
        """The bytes.

        Raises:
            ObjectNotFound: there is no such object.
        """

    async def get_file(self, key: str, path: Path) -> None:
        """Writes the bytes to a file, which is left incomplete when this raises.

        Raises:
            ObjectNotFound: there is no such object.
        """

    async def size(self, key: str) -> int | None:
        """Size in bytes; None when there is no such object."""

    async def stat(self, key: str) -> StoredObject | None:
        """Size and time of the last write; None when there is no such object."""

    def objects(self, prefix: str) -> AsyncIterator[StoredObject]:
        """Objects whose keys start with the prefix, each once, in the order of :meth:`list`."""

    def list(self, prefix: str) -> AsyncIterator[str]:
        """Keys that start with the prefix, each once, in the store's own order.

        S3's order is by bytes, but not SeaweedFS's, which gives ``a/b`` before ``a-b``: sort where it matters.
        """

    async def delete(self, key: str) -> None:
        """Removes the object; does nothing when it is not there."""
