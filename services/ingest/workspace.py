"""The local disk of ingest: a folder for every fetch, and the repositories that are kept from one fetch to the next.

Kept repositories are a cache, so that the next fetch transfers only what is new: one that is gone, damaged or with
another process costs a longer fetch and nothing else. A fetch takes its repository out of the cache and gives it back
when all went well, each by one rename: nobody else has it meanwhile, and nobody finds what a killed process left.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from codegraft.ingest.v1.source_pb2 import Source
from services.core import log

MAX_PACKS = 200
"""Every fetch adds a pack to a kept repository; with so many the next fetch begins anew."""
LEFT_BEHIND = timedelta(days=1)
"""Age at which a folder is a dead process's: no fetch may take so long."""
UPLOADS = "uploads"
"""Folder of uploads that have not all arrived."""
BROKEN_OFF = timedelta(days=7)
"""Age at which nobody goes on with one: it would take disk for ever."""

logger = log.get(__name__)


class Workspace:
    """What lies below one folder; several processes may share it. Blocks; for threads.

    Args:
        max_bytes: what kept repositories may take; those unused for longest go first. 0 keeps none.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._kept = root / "repositories"
        self._max_bytes = max_bytes

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder, removed at the end."""
        self._root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="fetch-", dir=self._root))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def take(self, source: Source, to: Path) -> bool:
        """Moves the source's repository to a path; False when none is kept."""
        try:
            (self._kept / _key(source)).rename(to)
        except OSError:
            return False
        return True

    def give(self, source: Source, repository: Path) -> None:
        """Keeps a repository that lacks nothing of its commit but very large files."""
        if not self._max_bytes:
            return
        if len(list(repository.glob("objects/pack/*.pack"))) > MAX_PACKS:
            shutil.rmtree(repository)
            repository.mkdir()  # taken next time, and filled as the first time
        target = self._kept / _key(source)
        with contextlib.suppress(OSError):  # what cannot be kept goes with its folder
            self._kept.mkdir(exist_ok=True)
            repository.rename(target)
            target.touch()

    def tidy(self, sources: Iterable[Source]) -> None:
        """Removes the repositories of all other sources, what is too much, and what dead processes and broken uploads
        left."""
        for path in self._root.glob("fetch-*"):
            if time.time() - _modified(path) > LEFT_BEHIND.total_seconds():
                shutil.rmtree(path, ignore_errors=True)
        for path in (self._root / UPLOADS).glob("*"):
            if time.time() - _modified(path) > BROKEN_OFF.total_seconds():
                path.unlink(missing_ok=True)
        wanted = {_key(source) for source in sources}
        left = self._max_bytes
        for path in sorted(self._kept.glob("*"), key=_modified, reverse=True):
            size = sum(_size(file) for file in path.rglob("*"))
            left -= size
            if path.name not in wanted or left < 0:
                with self.folder() as folder, contextlib.suppress(OSError):  # a fetch may be faster
                    path.rename(folder / "repository")
                    logger.info("a kept repository was removed", bytes=size, unwanted=path.name not in wanted)


def _key(source: Source) -> str:
    """Another one once the source is made anew or comes from elsewhere."""
    told = f"{source.name}\0{source.create_time.ToJsonString()}\0{source.git.url}"
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
