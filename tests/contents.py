"""Files as ingest stores them, for tests of what comes after."""

from __future__ import annotations

from services.core.store import Blobs
from services.ingest.contents import Contents
from services.ingest.files import FoundFile
from services.ingest.listing import EMPTY, Listing


async def stored(blobs: Blobs, files: dict[str, bytes]) -> Listing:
    """Stores every file in a pack of its own and lists them."""
    contents = Contents(blobs, EMPTY, 1)
    for path, data in files.items():
        await contents.add([FoundFile(path, data)])
    await contents.finish()
    return Listing.of(contents.files)
