"""A file as a source gives it, and which paths are let in."""

from __future__ import annotations

from dataclasses import dataclass

REGULAR, EXECUTABLE = 0o644, 0o755
"""The two modes that are kept, as git does."""
LFS_HEADER = b"version https://git-lfs.github.com/spec/v1\n"
"""First line of a Git LFS pointer: the text stands for a file that is elsewhere."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One regular file of a source."""

    path: str
    """Relative, with forward slashes; metadata only: nothing is ever written under it."""
    data: bytes
    mode: int = REGULAR


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry that is left out, and why: "symlink", "hardlink", "device", "unsafe-path", "oversize" and so on."""

    why: str


def plain_path(raw: str, max_bytes: int) -> str | None:
    """The path, when it is safe to keep and to show; None for what is absolute, climbs, or hides characters.

    Args:
        raw: as the source spells it; a leading "./" is dropped.
        max_bytes: longest path in UTF-8.
    """
    path = raw
    while path.startswith("./"):
        path = path[2:]
    try:
        encoded = path.encode()
    except UnicodeEncodeError:  # surrogates: bytes that are no UTF-8
        return None
    parts = path.split("/")
    unsafe = (
        not path
        or len(encoded) > max_bytes
        or "\\" in path
        or (len(path) > 1 and path[1] == ":")  # a Windows drive
        or any(part in {"", ".", ".."} for part in parts)
        # git takes every spelling of .git for a repository of its own
        or any(part.casefold() == ".git" for part in parts)
        or any(not character.isprintable() for character in path)  # control, bidi and other invisible characters
    )
    return None if unsafe else path


def below(path: str, subpath: str) -> str | None:
    """The path within a sub-folder; None when it lies outside. An empty sub-folder means all."""
    folder = subpath.strip("/")
    if not folder:
        return path
    return path[len(folder) + 1 :] if path.startswith(folder + "/") else None


def found(path: str, data: bytes, mode: int) -> FoundFile | Skipped:
    """The file, unless it only points to one."""
    if len(data) < 1024 and data.startswith(LFS_HEADER):
        return Skipped("lfs-pointer")
    return FoundFile(path, data, EXECUTABLE if mode & 0o111 else REGULAR)
