"""Losses that were measured before, in the object store.

A loss belongs to the content of a file, the model and how the file was read; not to a scan. So another threshold costs
nothing, one new file costs one file, and a scan whose worker was killed goes on where it stopped.

Losses are kept in immutable segments under one prefix per model and window; a segment's name is the digest of its
bytes. Readers take all of them.
"""

from __future__ import annotations

import hashlib

from services.core import log
from services.core.errors import ObjectNotFound
from services.core.store import ObjectStore
from services.scanner import plan
from services.scanner.loss import FileLoss
from services.scanner.rules import Rules

VERSION = 2
"""Raised when the same file, model and window would give another loss than before."""
MAX_SEGMENTS = 16
"""More than these are merged into one at the end of a scan."""

logger = log.get(__name__)


class LossCache:
    """The losses of one model read in one way.

    Args:
        store: where they are kept.
        model_digest: SHA-256 of the model's configuration and weights.
        rules: of which the window and the limit count.
    """

    def __init__(self, store: ObjectStore, model_digest: str, rules: Rules) -> None:
        self._store = store
        how = f"v{VERSION}-{rules.window_tokens}-{rules.max_tokens_per_file}"
        self._prefix = f"losses/{model_digest}/{how}/"
        self._new: dict[str, FileLoss] = {}

    async def load(self) -> dict[str, FileLoss]:
        """All of them, by the SHA-256 of the file's content."""
        return (await self._read())[0]

    def add(self, sha256: str, loss: FileLoss) -> None:
        """Remembers a loss until the next flush."""
        self._new[sha256] = loss

    async def flush(self) -> None:
        """Stores what was added."""
        if self._new:
            new, self._new = self._new, {}
            await self._write(new)

    async def compact(self) -> None:
        """Merges the segments when there are many. Losses that another scan stores meanwhile stay."""
        losses, keys = await self._read()
        if len(keys) > MAX_SEGMENTS:
            merged = await self._write(losses)
            for key in keys:
                if key != merged:
                    await self._store.delete(key)

    async def _read(self) -> tuple[dict[str, FileLoss], list[str]]:
        keys = [key async for key in self._store.list(self._prefix)]
        losses: dict[str, FileLoss] = {}
        for key in keys:
            try:
                data = await self._store.get(key)
            except ObjectNotFound:
                continue  # another scan has just merged it
            if key != self._key(data):
                logger.warning("a segment of the loss cache is damaged and left out", key=key)
                continue
            losses |= plan.losses_from_parquet(data)
        return losses, keys

    async def _write(self, losses: dict[str, FileLoss]) -> str:
        data = plan.losses_to_parquet(sorted(losses.items()))
        key = self._key(data)
        await self._store.put(key, data)
        return key

    def _key(self, data: bytes) -> str:
        return f"{self._prefix}{hashlib.sha256(data).hexdigest()}.parquet"
