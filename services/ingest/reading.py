"""Opening a source: from what its record says to the entries that are in it. Blocks throughout; for a thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from codegraft.ingest.v1.source_pb2 import BundleSource, GitSource, UrlSource
from services.core.errors import LimitExceeded, Unavailable
from services.ingest.files import Entry, Skipped, below, found, plain_path
from services.ingest.limits import Meter
from services.ingest.sources import archive, git, url
from services.ingest.sources.guard import Guard

REPOSITORY = "repository"
"""Folder of a fetch in which its bare repository is; when it is there before, the fetch builds on it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A source that is open."""

    entries: Iterator[Entry] | None
    """None when nothing changed since the last time."""
    since_last: bool = False
    """Whether the entries are what changed since the last time, instead of everything."""
    commit: str = ""
    """Of git; else empty."""
    remote: git.Remote | None = None
    keep: bool = False
    """Whether a later fetch can build on the repository."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Opens one source for one fetch."""

    folder: Path
    """For whatever has to lie on disk meanwhile; empty but for a repository."""
    meter: Meter
    guard: Guard
    known: Callable[[], Collection[str]] = tuple
    """Gives git's ids of contents that are stored already; may have to wait for them."""
    ca_file: Path | None = None
    _submodules: list[str] = field(default_factory=list)

    @contextmanager
    def open_git(self, origin: GitSource, secret: git.Secret | None, last_commit: str) -> Iterator[Reading]:
        """A remote repository.

        Args:
            last_commit: the commit of the last fetch; empty when there was none, or when it does not matter.
        """
        location = git.check_url(origin.url, self.guard)
        repository, private = self.folder / REPOSITORY, self.folder / "private"
        is_kept = repository.exists()
        with git.reach(location, secret, self.guard, repository, private, self.meter, self.ca_file) as remote:
            # Into a kept repository one fetch both asks and brings; without one, asking first is cheaper.
            if last_commit and not is_kept and not git.moved(remote, origin.ref, last_commit) and self.known():
                yield Reading(None, commit=last_commit, remote=remote)
                return
            # With most contents known, or only some wanted, it is cheaper to ask for the others by their ids.
            whole = is_kept or not (origin.subpath or self.known())
            fetched = git.fetch(remote, origin.ref, contents=whole)
            entries: Iterator[Entry] | None = None
            since_last = False
            if fetched.commit != last_commit or not self.known():
                if is_kept and last_commit and not origin.subpath and not origin.submodules and self.known():
                    entries = git.changes(fetched, last_commit, self.known())
                    since_last = entries is not None
                submodules = secret if origin.submodules else False
                entries = entries or self._tree(fetched, location, origin.subpath, submodules)
            yield Reading(entries, since_last, fetched.commit, remote, keep=whole)

    @contextmanager
    def open_bundle(self, origin: BundleSource, content: Path, last_commit: str) -> Iterator[Reading]:
        """An uploaded git bundle."""
        repository = git.unbundle(content, origin.ref, self.folder / "repository", self.meter)
        if repository.commit == last_commit and self.known():
            yield Reading(None, commit=last_commit)
        else:
            yield Reading(self._tree(repository, "", origin.subpath, False), commit=repository.commit)

    @contextmanager
    def open_archive(self, content: Path, subpath: str) -> Iterator[Reading]:
        """An uploaded archive."""
        yield Reading(archive.read(content, subpath, self.meter))

    @contextmanager
    def open_file(self, content: Path, path: str) -> Iterator[Reading]:
        """A single uploaded file."""
        yield Reading(self._single(content, path))

    @contextmanager
    def open_url(self, origin: UrlSource) -> Iterator[Reading]:
        """A file or an archive behind a URL."""
        target = self.folder / "download"
        url.download(origin.url, origin.sha256, target, self.meter, self.guard, self.ca_file)
        if archive.is_archive(target):
            yield Reading(archive.read(target, "", self.meter))
        else:
            name = origin.url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
            yield Reading(self._single(target, name))

    def _tree(
        self,
        repository: git.Repository,
        location: str,
        subpath: str,
        secret: git.Secret | bool | None,
        prefix: str = "",
        depth: int = 0,
    ) -> Iterator[Entry]:
        """A commit's files, and those of its submodules unless ``secret`` is False."""
        yield from git.read(repository, subpath, self.known(), prefix)
        submodules, unknown = git.find(repository, location, subpath, self.guard)
        if secret is False or depth == git.MAX_DEPTH:
            yield from [Skipped("submodule")] * (len(submodules) + unknown)
            return
        yield from [Skipped("submodule")] * unknown
        for submodule in submodules:
            self._submodules.append(submodule.path)
            if len(self._submodules) > git.MAX_SUBMODULES:
                raise LimitExceeded(
                    f"the repository has more than {git.MAX_SUBMODULES} submodules",
                    hint="Add those that matter as sources of their own.",
                )
            inside = below(submodule.path, subpath) or ""
            number = len(self._submodules)
            # A credential is for its own host only.
            shared = secret if git.place(submodule.url) == git.place(location) else None
            assert not isinstance(shared, bool)
            folder, private = self.folder / f"submodule-{number}", self.folder / f"private-{number}"
            with git.reach(submodule.url, shared, self.guard, folder, private, self.meter, self.ca_file) as remote:
                fetched = git.fetch(remote, submodule.commit, contents=not self.known())
                yield from self._tree(fetched, submodule.url, "", secret, f"{prefix}{inside}/", depth + 1)

    def _single(self, content: Path, path: str) -> Iterator[Entry]:
        plain = plain_path(path, self.meter.limits)
        if plain is None:
            yield Skipped("unsafe-path")
        elif content.stat().st_size > self.meter.limits.max_file_bytes:
            yield Skipped("oversize")
        else:
            yield found(plain, content.read_bytes(), 0)


def pinned(reading: Reading, known_hosts: Collection[str]) -> list[str]:
    """Host keys that ssh noted while the source was open: those of hosts that were not known before."""
    if reading.remote is None or reading.remote.pinned is None:
        return []
    try:
        lines = reading.remote.pinned.read_text().splitlines()
    except OSError as error:
        raise Unavailable(f"the host keys cannot be read: {error.strerror}") from None
    return [line for line in lines if line.strip() and line not in known_hosts]
