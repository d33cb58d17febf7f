"""Settings of the ingest service."""

from __future__ import annotations

from pydantic import Field

from services.core.config import CoreSettings
from services.ingest.limits import Limits

_DEFAULT = Limits()


class IngestSettings(CoreSettings):
    """What ingest needs besides the core's settings. Use ``services.core.config.load``."""

    ingest_fetches: int = Field(default=4, ge=1, le=64)
    """Sources that are fetched at once."""
    ingest_puts: int = Field(default=16, ge=1, le=128)
    """Files of one source that are stored at once."""
    ingest_max_upload_bytes: int = Field(default=8 << 30, ge=1)
    """Largest upload."""
    ingest_max_files: int = Field(default=_DEFAULT.max_files, ge=1)
    """Files of one source."""
    ingest_max_total_bytes: int = Field(default=_DEFAULT.max_total_bytes, ge=1)
    """Inflated bytes of one source."""
    ingest_max_file_bytes: int = Field(default=_DEFAULT.max_file_bytes, ge=1)
    """Larger files are left out."""
    ingest_max_ratio: int = Field(default=_DEFAULT.max_ratio, ge=2)
    """Inflated bytes per compressed byte of an archive."""
    ingest_max_seconds: float = Field(default=_DEFAULT.max_seconds, gt=0)
    """Time for reading one source."""
    ingest_allowed_urls: tuple[str, ...] = ()
    """URL prefixes that are fetched although they are not https or ssh, or lead to a private address; a JSON list."""

    @property
    def limits(self) -> Limits:
        """The bounds of one source."""
        return Limits(
            max_files=self.ingest_max_files,
            max_total_bytes=self.ingest_max_total_bytes,
            max_file_bytes=self.ingest_max_file_bytes,
            max_ratio=self.ingest_max_ratio,
            max_seconds=self.ingest_max_seconds,
        )
