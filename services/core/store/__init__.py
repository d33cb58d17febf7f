"""The object store: bytes by key, blobs by their digest, and immutable artifacts over both."""

from services.core.store.artifacts import Artifacts
from services.core.store.blobs import Blobs
from services.core.store.memory import MemoryStore
from services.core.store.packs import Pack, Packs, Place, verify
from services.core.store.s3 import S3Store
from services.core.store.store import ObjectStore, StoredObject

__all__ = [
    "Artifacts",
    "Blobs",
    "MemoryStore",
    "ObjectStore",
    "Pack",
    "Packs",
    "Place",
    "S3Store",
    "StoredObject",
    "verify",
]
