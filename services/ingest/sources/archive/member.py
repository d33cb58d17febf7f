"""One member of an archive on its way to a file."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import BrokenArchive
from services.ingest.files import FoundFile, Skipped, below, found, plain_path
from services.ingest.limits import Meter
from services.ingest.sources.archive.inflate import OUTPUT, Stream


@dataclass(frozen=True, slots=True)
class Member:
    """What the archive says of a regular member."""

    name: str
    mode: int
    size: int
    """In bytes, as claimed."""


def take(member: Member, content: Stream, subpath: str, meter: Meter) -> FoundFile | Skipped:
    """Reads a member's content when it is wanted.

    Raises:
        BrokenArchive: it is shorter or longer than the archive says.
    """
    path = plain_path(member.name, meter.limits)
    if path is None:
        return Skipped("unsafe-path")
    inside = below(path, subpath)
    if inside is None:
        return Skipped("outside-subpath")
    if member.size > meter.limits.max_file_bytes:
        return Skipped("oversize")
    data = bytearray()
    while part := content.read(OUTPUT):
        data += part
        if len(data) > member.size:
            break
    if len(data) != member.size:
        raise BrokenArchive(
            f"the archive's member {path[-200:]!r} does not have the size that is told",
            hint="Make the archive anew and upload it again.",
        )
    return found(inside, bytes(data), member.mode)
