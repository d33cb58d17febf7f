"""A file as a source gives it, and which paths are let in."""

from __future__ import annotations

from dataclasses import dataclass

from services.ingest.limits import Limits

REGULAR, EXECUTABLE = 0o644, 0o755
"""The two modes that are kept, as git does."""
LFS_HEADER = b"version https://git-lfs.github.com/spec/v1\n"
"""First line of a Git LFS pointer: the text stands for a file that is elsewhere."""
LFS_POINTER_BYTES = 1024
"""A pointer is shorter than this, by its specification."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One regular file of a source."""

    path: str
    """Relative, with forward slashes; metadata only: nothing is ever written under it."""
    data: bytes
    mode: int = REGULAR
    object_id: str = ""
    """git's id of the content; empty for what is not git."""


@dataclass(frozen=True, slots=True)
class SameFile:
    """A regular file whose content an earlier fetch has stored: it need not be read again."""

    path: str
    mode: int
    object_id: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry that is left out, and why: "symlink", "hardlink", "device", "unsafe-path", "oversize" and so on."""

    why: str
    count: int = 1
    """-1 for one that an earlier fetch left out and that is there no more."""


@dataclass(frozen=True, slots=True)
class Removed:
    """A file of an earlier fetch that is there no more, or not as it was."""

    path: str


Entry = FoundFile | SameFile | Skipped | Removed


def plain_path(raw: str, limits: Limits) -> str | None:
    """The path, when it is safe to keep and to show; None for what is absolute, climbs, or hides characters.

    Args:
        raw: as the source spells it; a leading "./" is dropped.
    """
    path = raw
    while path.startswith("./"):
        path = path[2:]
    try:
        size = len(path.encode())
    except UnicodeEncodeError:  # surrogates: bytes that are no UTF-8
        return None
    if not path or size > limits.max_path_bytes:
        return None
    parts = path.split("/")
    unsafe = (
        len(parts) > limits.max_depth
        or "\\" in path
        or (len(path) > 1 and path[1] == ":")  # a Windows drive
        or any(part in {"", ".", ".."} for part in parts)
        # git takes every spelling of .git for a repository of its own
        or any(part.casefold() == ".git" for part in parts)
        or not path.isprintable()  # control, bidi and other invisible characters
    )
    return None if unsafe else path


def below(path: str, subpath: str) -> str | None:
    """The path within a sub-folder; None when it lies outside. An empty sub-folder means all."""
    folder = subpath.strip("/")
    if not folder:
        return path
    return path[len(folder) + 1 :] if path.startswith(folder + "/") else None


def found(path: str, data: bytes, mode: int, object_id: str = "") -> FoundFile | Skipped:
    """The file, unless it only points to one."""
    if len(data) < LFS_POINTER_BYTES and data.startswith(LFS_HEADER):
        return Skipped("lfs-pointer")
    return FoundFile(path, data, EXECUTABLE if mode & 0o111 else REGULAR, object_id)
