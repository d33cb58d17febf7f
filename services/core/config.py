"""Settings that every service has, read from the environment over an optional TOML file.

A service adds its own fields in a subclass (services/<name>/config.py), named with the service's name in front
(``scanner_max_file_bytes``), so that one file and one environment can hold the settings of all four. The variable of a
field is its name in capitals behind ``CODEGRAFT_``.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from services.core.errors import InvalidArgument
from services.core.quota.limits import Defaults

PREFIX = "CODEGRAFT_"
FILE_VARIABLE = PREFIX + "CONFIG"
"""Variable that names the TOML file."""


class CoreSettings(BaseSettings):
    """What every service needs to find its peers, NATS and the object store. Use :func:`load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        # The file is shared by four services: each picks its own fields.
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    listen: str = "127.0.0.1:0"
    """host:port of the gRPC server; port 0 takes a free one, which the first log line names."""
    drain_seconds: float = Field(default=10, ge=0)
    """How long running calls may go on after SIGTERM."""
    startup_timeout_seconds: float = Field(default=60, gt=0)
    """How long to wait for NATS and the object store at start before giving up."""
    job_lease_seconds: float = Field(default=30, ge=1)
    """How long a worker that is silent keeps its scan, part of a scan or run before another takes over; the same in all
    replicas of a service. Shorter is quicker after a crash, but must outlast pauses of the machine."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    cache_dir: Path = Path("~/.cache/codegraft")
    """Local cache of artifacts and model weights; may be deleted at any time while nothing runs."""

    metrics_listen: str = ""
    """host:port of an HTTP server with the figures for Prometheus, which asks for no password; empty has none."""
    metrics_namespace: str = ""
    """Label ``namespace`` of figures that scaling asks for: that of Kubernetes, in which the service runs."""
    otlp_endpoint: str = Field(default="", pattern=r"^(https?://[^/@\s]+)?$")
    """URL of an OpenTelemetry collector (gRPC, http://host:4317) that takes spans; empty leaves it to the standard
    OTEL_EXPORTER_OTLP_… variables, and without those records none."""

    auth: Literal["on", "off"] = "on"
    """Whether callers must authenticate; "off" only where no other machine can call (``listen`` on loopback)."""
    api_key: SecretStr = SecretStr("")
    """The service's own API key, with which it calls other services."""
    auth_issuer: str = ""
    """Issuer whose OIDC tokens are taken beside API keys, as their "iss" spells it; empty takes none."""
    auth_audience: str = "codegraft"
    """What the tokens' "aud" must hold."""
    auth_jwks_url: str = ""
    """Where the issuer has its public keys; empty asks its /.well-known/openid-configuration."""
    auth_role_claim: str = "codegraft_role"
    """Claim that tells the role: one word or a list of which the highest counts; dots lead into objects."""
    auth_roles: dict[str, Literal["reader", "completer", "contributor", "operator"]] = Field(default_factory=dict)
    """What the role claim's values mean, a JSON object such as {"dev-team": "contributor"}; empty takes the roles' own
    names."""
    auth_projects_claim: str = "codegraft_projects"
    """Claim with the ids of the caller's projects; "*" means all."""

    quota_project: Defaults = Defaults()
    """What a project may use for which no operator has set anything, a JSON object with any of requests_per_minute,
    tokens_per_minute, storage_bytes, runs and scans; empty limits nothing."""
    quota_key: Defaults = Defaults()
    """The same for an API key, or the subject of a token."""

    tls_cert_file: Path | None = None
    """Certificate chain (PEM) of the gRPC server, and of the service when it calls others; read anew when it changes.
    Unset serves without TLS."""
    tls_key_file: Path | None = None
    """Its private key (PEM)."""
    tls_client_ca_file: Path | None = None
    """Certificates (PEM) of which one must have signed a caller's own: mutual TLS. Unset asks callers for none."""
    tls_ca_file: Path | None = None
    """Certificates (PEM) of which one must have signed those of the services that are called; set calls with TLS."""

    nats_url: str = "nats://127.0.0.1:4222"
    """Comma-separated URLs of the NATS servers."""
    nats_user: str = ""
    """User at NATS; empty for a server without authentication."""
    nats_password: SecretStr = SecretStr("")
    """Password at NATS."""
    nats_ca_file: Path | None = None
    """Certificates (PEM) of which one must have signed that of the NATS servers; set connects with TLS only."""
    nats_cert_file: Path | None = None
    """Certificate (PEM) to show to NATS servers that ask for one."""
    nats_key_file: Path | None = None
    """Its private key (PEM)."""
    nats_replicas: int = Field(default=1, ge=1, le=5)
    """Copies of every stream and bucket that is made; 3 on a cluster."""

    s3_endpoint: str = "127.0.0.1:9000"
    """host:port of the S3 server, without scheme."""
    s3_access_key: SecretStr = SecretStr("")
    """Access key id at the S3 server."""
    s3_secret_key: SecretStr = SecretStr("")
    """Secret key at the S3 server."""
    s3_bucket: str = Field(default="codegraft", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """Bucket that holds blobs and artifacts; made at start when it is not there."""
    s3_secure: bool = False
    """Whether the S3 server speaks TLS."""

    ingest_address: str = "127.0.0.1:50051"
    """gRPC address of the ingest service."""
    scanner_address: str = "127.0.0.1:50052"
    """gRPC address of the scanner service."""
    trainer_address: str = "127.0.0.1:50053"
    """gRPC address of the trainer service."""
    inference_address: str = "127.0.0.1:50054"
    """gRPC address of the inference service."""

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator(
        "listen", "s3_endpoint", "ingest_address", "scanner_address", "trainer_address", "inference_address"
    )
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        address = value.removeprefix("dns:///")
        if "//" in address or "@" in address:
            raise ValueError("must be host:port, without scheme and credentials")
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdecimal() and int(port) < 65536):
            raise ValueError("must be host:port")
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _host_and_port_or_empty(cls, value: str) -> str:
        return cls._host_and_port(value) if value else value

    @field_validator(
        "tls_cert_file",
        "tls_key_file",
        "tls_client_ca_file",
        "tls_ca_file",
        "nats_ca_file",
        "nats_cert_file",
        "nats_key_file",
    )
    @classmethod
    def _is_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.expanduser().is_file():
            raise ValueError("is no file")
        return value.expanduser().absolute() if value is not None else None

    @property
    def job_lease(self) -> timedelta:
        """``job_lease_seconds``."""
        return timedelta(seconds=self.job_lease_seconds)

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only this machine can call."""
        host = self.listen.removeprefix("dns:///").rpartition(":")[0].strip("[]")
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over environment over the file."""
        path = os.environ.get(FILE_VARIABLE)
        if not path:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=Path(path).expanduser())


Settings = TypeVar("Settings", bound=CoreSettings)


def load(settings_class: type[Settings]) -> Settings:
    """Reads the settings.

    Raises:
        InvalidArgument: a value is out of its range, or the file is missing or no TOML; names the variable at fault,
            and never repeats a value, which may be a secret.
    """
    path = os.environ.get(FILE_VARIABLE)
    if path and not Path(path).expanduser().is_file():
        raise InvalidArgument(
            f"the settings file {path} is not there", field=FILE_VARIABLE, hint=f"Correct or unset {FILE_VARIABLE}."
        )
    try:
        return settings_class()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        variable = PREFIX + str(first["loc"][0]).upper() if first["loc"] else PREFIX.rstrip("_")
        raise InvalidArgument(
            f"setting {variable}: {first['msg'].removeprefix('Value error, ')}",
            field=variable,
            hint=f"Correct {variable} in the environment" + (f" or in {path}." if path else "."),
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"the settings file {path} is not valid TOML: {error}", field=FILE_VARIABLE, hint=f"Correct {path}."
        ) from None
