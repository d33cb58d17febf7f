"""The files of a commit, read object by object."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from services.core.errors import SourceUnreachable
from services.ingest.files import EXECUTABLE, REGULAR, Entry, SameFile, Skipped, below, found, plain_path
from services.ingest.limits import Meter
from services.ingest.sources.git.fetch import Repository, fetch_objects

_AHEAD = 64
"""Files that are asked for before the first is read: few enough that the requests fit into a pipe."""
_LINK, _SUBMODULE = "120000", "160000"


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
    limits = repository.git.meter.limits
    wanted: list[tuple[TreeEntry, str]] = []
    for entry in entries(repository, subpath):
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
    yield from _contents(repository, wanted)


def _contents(repository: Repository, wanted: Sequence[tuple[TreeEntry, str]]) -> Iterator[Entry]:
    git = repository.git
    sizes = _sizes(repository, wanted)
    if not repository.has_contents and (missing := [object_id for object_id, size in sizes.items() if size is None]):
        fetch_objects(repository, missing)
        sizes = _sizes(repository, wanted)
    small = [pair for pair in wanted if _is_small(sizes[pair[0].object_id], git.meter)]
    for _ in range(len(wanted) - len(small)):
        yield Skipped("oversize")
    with git.talk("cat-file", "--batch") as (requests, contents):
        for at in range(0, len(small), _AHEAD):
            group = small[at : at + _AHEAD]
            requests.write(b"".join(entry.object_id.encode() + b"\n" for entry, _ in group))
            requests.flush()
            for entry, path in group:
                header = contents.readline(200).split()
                if len(header) != 3 or header[1] != b"blob":
                    git.meter.check_time()
                    raise SourceUnreachable(
                        "the repository lacks an object", hint="Run `git fsck` where it comes from."
                    )
                data = contents.read(int(header[2]))
                contents.read(1)
                git.meter.count_bytes(len(data))
                yield found(path, data, int(entry.mode, 8), entry.object_id)


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
