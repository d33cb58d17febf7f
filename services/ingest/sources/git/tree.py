"""The files of a commit, read object by object."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.core.errors import SourceUnreachable
from services.ingest.files import EXECUTABLE, REGULAR, Entry, Removed, SameFile, Skipped, below, found, plain_path
from services.ingest.limits import Meter
from services.ingest.sources.git.fetch import Repository, fetch_objects

_AHEAD = 64
"""Files that are asked for before the first is read: few enough that the requests fit into a pipe."""
_LINK, _SUBMODULE, _NOTHING = "120000", "160000", "000000"


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One entry of the commit's tree."""

    mode: str
    """Octal, as git writes it."""
    object_id: str
    path: str
    """Bytes that are no UTF-8 stand as surrogates."""

    @property
    def is_submodule(self) -> bool:
        return self.mode == _SUBMODULE


def entries(repository: Repository, subpath: str = "") -> Iterator[TreeEntry]:
    """Every entry that is no folder, at or below a folder, in the order of the tree.

    Raises:
        LimitExceeded: there are too many.
        SourceUnreachable: the tree is damaged.
    """
    folder = subpath.strip("/")
    inside = f"{repository.commit}:{folder}" if folder else repository.commit
    prefix = folder + "/" if folder else ""
    if folder and repository.git.run("rev-parse", "--verify", "--quiet", "--end-of-options", inside).code:
        return  # no such folder, so no file
    with repository.git.talk("ls-tree", "-r", "-z", "--full-tree", inside) as (_, output):
        rest = b""
        while part := output.read1(1 << 16):  # type: ignore[attr-defined]
            *lines, rest = (rest + part).split(b"\0")
            for line in lines:
                about, _, path = line.partition(b"\t")
                mode, _, object_id = about.decode().split()
                repository.git.meter.count_file()
                yield TreeEntry(mode, object_id, prefix + path.decode(errors="surrogateescape"))
            if len(rest) > 1 << 20:
                raise SourceUnreachable("the repository's tree is damaged", hint="Run `git fsck` where it comes from.")


def read(repository: Repository, subpath: str = "", known: Collection[str] = (), prefix: str = "") -> Iterator[Entry]:
    """The regular files of the commit, in the order of its tree; submodules are not in it.

    Args:
        subpath: only what lies below this folder.
        known: ids of contents that need not be read again.
        prefix: put before every path; a submodule's folder.

    Raises:
        LimitExceeded: there are more files or bytes than the limits allow.
        SourceUnreachable: objects are missing.
    """
    yield from _read(repository, entries(repository, subpath), subpath, known, prefix)


def changes(repository: Repository, since: str, known: Collection[str]) -> Iterator[Entry] | None:
    """What :func:`read` would give of the whole commit, as the difference to an earlier commit.

    Args:
        since: a commit that the repository had before.
        known: ids of the contents that were read then.

    Returns:
        None when the difference cannot be told: the earlier commit is not there, or a submodule changed.
    """
    done = repository.git.run("diff-tree", "-r", "-z", "--no-renames", since, repository.commit)
    if done.code:
        return None
    before, now = [], []
    fields = done.output.decode(errors="surrogateescape").split("\0")
    for about, path in zip(fields[::2], fields[1::2], strict=False):
        old_mode, mode, old_id, object_id, _ = about.removeprefix(":").split()
        before.append(TreeEntry(old_mode, old_id, path))
        now.append(TreeEntry(mode, object_id, path))
    if any(entry.is_submodule for entry in (*before, *now)):
        return None
    return itertools.chain(
        _no_more(repository, [entry for entry in before if entry.mode != _NOTHING], known),
        _read(repository, (entry for entry in now if entry.mode != _NOTHING), "", known, ""),
    )


def _no_more(repository: Repository, before: Sequence[TreeEntry], known: Collection[str]) -> Iterator[Entry]:
    limits = repository.git.meter.limits
    left_out = []
    for entry in before:
        if entry.mode == _LINK:
            yield Skipped("symlink", -1)
        elif (path := plain_path(entry.path, limits)) is None:
            yield Skipped("unsafe-path", -1)
        elif entry.object_id in known:
            yield Removed(path)
        else:
            left_out.append((entry, path))
    sizes = _sizes(repository, left_out) if left_out else {}
    for entry, _ in left_out:
        yield Skipped("lfs-pointer" if _is_small(sizes[entry.object_id], repository.git.meter) else "oversize", -1)


def _read(
    repository: Repository, found: Iterable[TreeEntry], subpath: str, known: Collection[str], prefix: str
) -> Iterator[Entry]:
    limits = repository.git.meter.limits
    wanted: list[tuple[TreeEntry, str]] = []
    for entry in found:
        if entry.is_submodule:
            continue
        elif entry.mode == _LINK:
            yield Skipped("symlink")
        elif (path := plain_path(prefix + entry.path, limits)) is None:
            yield Skipped("unsafe-path")
        elif (inside := below(path, prefix + subpath if subpath else "")) is None:
            continue
        elif entry.object_id in known:
            yield SameFile(inside, _mode(entry), entry.object_id)
        else:
            wanted.append((entry, inside))
    if wanted:
        yield from _contents(repository, wanted)


def _contents(repository: Repository, wanted: Sequence[tuple[TreeEntry, str]]) -> Iterator[Entry]:
    git = repository.git
    if not repository.has_contents:
        sizes = _sizes(repository, wanted)
        if missing := [object_id for object_id, size in sizes.items() if size is None]:
            fetch_objects(repository, missing)
    with git.talk("cat-file", "--batch-command") as (requests, answers):

        def ask(command: str, group: Sequence[tuple[TreeEntry, str]]) -> Iterator[tuple[TreeEntry, str, int | None]]:
            requests.write("".join(f"{command} {entry.object_id}\n" for entry, _ in group).encode())
            requests.flush()
            for entry, path in group:
                header = answers.readline(200).split()
                if len(header) == 3 and header[1] == b"blob":
                    yield entry, path, int(header[2])
                elif header[1:] == [b"missing"]:
                    yield entry, path, None
                else:
                    git.meter.check_time()
                    raise _damaged("an object")

        for at in range(0, len(wanted), _AHEAD):
            group = wanted[at : at + _AHEAD]
            small = [(entry, path) for entry, path, size in ask("info", group) if _is_small(size, git.meter)]
            for _ in range(len(group) - len(small)):
                yield Skipped("oversize")
            for entry, path, size in ask("contents", small):
                if size is None:
                    raise _damaged("an object")
                data = answers.read(size)
                answers.read(1)
                git.meter.count_bytes(len(data))
                yield found(path, data, int(entry.mode, 8), entry.object_id)


def _damaged(what: str) -> SourceUnreachable:
    return SourceUnreachable(f"the repository lacks {what}", hint="Run `git fsck` where it comes from.")


def _sizes(repository: Repository, wanted: Sequence[tuple[TreeEntry, str]]) -> dict[str, int | None]:
    """Bytes of each content; None for one that is not here."""
    ids = list(dict.fromkeys(entry.object_id for entry, _ in wanted))
    asked = "".join(f"{object_id}\n" for object_id in ids).encode()
    done = repository.git.run("cat-file", "--batch-check=%(objectname) %(objecttype) %(objectsize)", stdin=asked)
    sizes: dict[str, int | None] = dict.fromkeys(ids)
    for line in done.output.decode().splitlines():
        object_id, kind, *size = line.split()
        if kind == "blob":
            sizes[object_id] = int(size[0])
    return sizes


def _is_small(size: int | None, meter: Meter) -> bool:
    """What is not here was left out for its size."""
    return size is not None and size <= meter.limits.max_file_bytes


def _mode(entry: TreeEntry) -> int:
    return EXECUTABLE if int(entry.mode, 8) & 0o111 else REGULAR
