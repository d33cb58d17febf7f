"""The object store: bytes by key, blobs by their digest, and immutable artifacts over both."""

from services.core.store.artifacts import Artifacts
from services.core.store.blobs import Blobs
from services.core.store.memory import MemoryStore
from services.core.store.s3 import S3Store
from services.core.store.store import ObjectStore

__all__ = ["Artifacts", "Blobs", "MemoryStore", "ObjectStore", "S3Store"]
