"""Settings of the ingest service."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from services.core.config import CoreSettings
from services.ingest.credentials import Vault
from services.ingest.keys import Seed
from services.ingest.limits import Limits
from services.ingest.sources.guard import Guard

_DEFAULT = Limits()


class IngestSettings(CoreSettings):
    """What ingest needs besides the core's settings. Use ``services.core.config.load``."""

    ingest_fetches: int = Field(default=4, ge=1, le=64)
    """Sources that are fetched at once."""
    ingest_puts: int = Field(default=3, ge=1, le=32)
    """Packs of one source (8 MiB each) that are on their way to the store at once."""
    ingest_kept_bytes: int = Field(default=20 << 30, ge=0)
    """What repositories may take in cache_dir that are kept so that a sync fetches only what is new; those unused for
    longest go first. 0 keeps none: every sync takes a few round trips more."""
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
    ingest_max_depth: int = Field(default=_DEFAULT.max_depth, ge=1)
    """Folders above a file."""
    ingest_allowed_urls: tuple[str, ...] = ()
    """URL prefixes that are fetched although they are not https or ssh, or lead to a private address; a JSON list, for
    example ["https://git.corp.example/", "ssh://git@git.corp.example/"]."""
    ingest_allowed_networks: tuple[str, ...] = ()
    """Networks that may be connected to although they are not public; a JSON list such as ["10.1.0.0/16"]."""
    ingest_ca_file: Path | None = None
    """Certificates (PEM) to trust for https instead of the system's."""
    ingest_credential_keys: tuple[SecretStr, ...] = ()
    """Fernet keys that encrypt credentials, a JSON list: the first seals, every one opens."""
    ingest_seed_keys: tuple[Seed, ...] = ()
    """API keys that are there from the start, in all projects: the first operator's, and those with which the services
    call each other. A JSON list such as [{"key": "cg_admin_…", "role": "operator"}]."""
    ingest_lease_seconds: float = Field(default=20, gt=1)
    """How long a process that fetches a source may be silent before another one takes over."""

    @field_validator("ingest_allowed_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)  # its ValueError says what is wrong
        return networks

    @field_validator("ingest_credential_keys")
    @classmethod
    def _keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        Vault([key.get_secret_value() for key in keys])
        return keys

    @property
    def limits(self) -> Limits:
        """The bounds of one source."""
        return Limits(
            max_files=self.ingest_max_files,
            max_total_bytes=self.ingest_max_total_bytes,
            max_file_bytes=self.ingest_max_file_bytes,
            max_ratio=self.ingest_max_ratio,
            max_seconds=self.ingest_max_seconds,
            max_depth=self.ingest_max_depth,
        )

    @property
    def guard(self) -> Guard:
        """Which hosts may be fetched from."""
        return Guard(self.ingest_allowed_urls, self.ingest_allowed_networks)

    @property
    def vault(self) -> Vault:
        """What seals credentials."""
        return Vault([key.get_secret_value() for key in self.ingest_credential_keys])
