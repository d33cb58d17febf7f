"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from services.core.config import CoreSettings


class GatewaySettings(CoreSettings):
    """What the gateway needs beyond the core's settings. NATS and the object store are none of its business."""

    gateway_hosts: tuple[str, ...] = ()
    """Names under which it is reached, as the Host header has them, without port. Empty: any, unless it listens on
    loopback; then only loopback's own, so that no web page gets to it by a name that it points there."""
    gateway_origins: tuple[str, ...] = ()
    """Origins (https://editor.example) whose web pages may call it. None by default."""
    gateway_body_bytes: int = Field(default=2 << 20, ge=1 << 10, le=3 << 20)
    """Largest body of a request; the services take messages of 4 MiB."""
    gateway_body_seconds: float = Field(default=10, gt=0)
    """Longest time for a request's body to arrive."""
    gateway_timeout_seconds: float = Field(default=120, gt=0)
    """Longest time for an answer; a completion then ends with the text so far."""
    gateway_requests: int = Field(default=1000, ge=1)
    """Most requests at once; more get OVERLOADED at once, with the time after which to come back."""
    gateway_cert_file: Path | None = None
    """Certificate chain (PEM) with which it serves HTTPS; read anew when it changes. Unset serves plain HTTP, for
    loopback or behind a proxy. It is not tls_cert_file, which it shows to the services."""
    gateway_key_file: Path | None = None
    """Its private key (PEM), without a password."""
    gateway_console_key: SecretStr = SecretStr("")
    """Seals the cookies of who is signed in to the console: 32 random characters or more, the same for all replicas.
    Empty takes a random one at every start."""

    @field_validator("gateway_cert_file", "gateway_key_file")
    @classmethod
    def _is_a_file(cls, value: Path | None) -> Path | None:
        return cls._is_file(value)

    @field_validator("gateway_console_key")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value()) < 32:
            raise ValueError("must have 32 characters or more; openssl rand -base64 32 makes one")
        return value
