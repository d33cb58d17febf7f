"""The data folder of a local stack: its lock, credentials, remembered ports, description and logs.

lock                held by the supervisor as long as it lives; its process id is inside
credentials.json    random keys of NATS, S3, the services and the console, readable by the owner only (0600)
ports.json          the ports of the last start
stack.json          what runs: state, processes, addresses; what clients read
logs/<name>.log     output of every process
nats/ s3/           the data of the two servers
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.cli.local.permissions import SERVICES
from services.core.auth.keys import ApiKey
from services.core.errors import FailedPrecondition


class StackState(StrEnum):
    """Where a stack stands."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class ProcessInfo:
    """One process of a stack, as ``status`` shows it."""

    name: str
    pid: int
    address: str
    log: str
    crash: str = ""
    """How it ended by itself; empty while it runs."""
    metrics: str = ""
    """URL of its figures; empty where it has none."""


@dataclass
class StackInfo:
    """What stack.json says."""

    state: StackState
    pid: int = 0
    """The supervisor's."""
    processes: dict[str, ProcessInfo] = field(default_factory=dict)
    error: str = ""
    """Why the last start failed."""


@dataclass(frozen=True)
class ServiceCredentials:
    """With what one service shows who it is: to NATS, to S3, and to the other services."""

    nats_password: str = field(repr=False)
    s3_access_key: str = field(repr=False)
    s3_secret_key: str = field(repr=False)
    api_key: str = field(repr=False)

    @classmethod
    def random(cls, service: str) -> ServiceCredentials:
        return cls(*_login(), api_key=ApiKey.new(service).text)


@dataclass(frozen=True)
class Credentials:
    """Random keys of one stack. Never printed, never on a command line."""

    nats_user: str = field(repr=False)
    nats_password: str = field(repr=False)
    """Of the user who may do everything; no service has it."""
    s3_access_key: str = field(repr=False)
    s3_secret_key: str = field(repr=False)
    """As above."""
    ingest_key: str = field(repr=False)
    """Encrypts the credentials of private repositories; a Fernet key."""
    api_key: str = field(repr=False)
    """The operator's, with which the commands call, and people sign in to the console."""
    console_key: str = field(repr=False)
    """Seals the console's cookies, so that a restart signs nobody out."""
    services: dict[str, ServiceCredentials] = field(repr=False)

    @classmethod
    def random(cls) -> Credentials:
        return cls(
            "codegraft",
            *_login(),
            ingest_key=base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            api_key=ApiKey.new("local").text,
            console_key=secrets.token_urlsafe(32),
            services={name: ServiceCredentials.random(name) for name in SERVICES},
        )

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Credentials:
        """Of the file's content; what an older version did not write comes fresh.

        Raises:
            TypeError, KeyError: it is damaged.
        """
        for part in ("nats_user", "nats_password", "s3_access_key", "s3_secret_key"):
            stored[part]
        whole = asdict(cls.random()) | stored
        services = {name: ServiceCredentials(**each) for name, each in whole["services"].items()}
        return cls(**{**whole, "services": services})


def _login() -> tuple[str, str, str]:
    """A password for NATS, an access key and a secret key for S3."""
    return secrets.token_urlsafe(32), secrets.token_hex(10).upper(), secrets.token_urlsafe(32)


class DataFolder:
    """The files of one stack. Files are replaced as a whole, so that a reader never sees a part."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._lock: int | None = None

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def create(self) -> None:
        """Makes the folder, closed to other users.

        Raises:
            FailedPrecondition: it cannot be made or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise FailedPrecondition(
                f"the data folder {self.root} cannot be used: {error.strerror}", hint="Choose another one with --data."
            ) from error

    # --- the lock ---------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Takes the lock for the life of this process; False when a supervisor holds it."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(10):  # a look at the lock, as `supervisor` takes, is in the way for a moment only
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.03)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            self._lock = descriptor
            return True
        os.close(descriptor)
        return False

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def supervisor(self) -> int | None:
        """Process id of the supervisor that holds the lock (0 in the first instant); None when none does."""
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return int(os.pread(descriptor, 32, 0) or b"0")
        finally:
            os.close(descriptor)

    # --- what is in it ----------------------------------------------------------------------------------------------

    @property
    def secrets(self) -> Path:
        """The file with :meth:`credentials`."""
        return self.root / "credentials.json"

    def credentials(self) -> Credentials:
        """The stack's credentials, made at the first call.

        Raises:
            FailedPrecondition: the file is damaged.
        """
        path = self.secrets
        if not path.exists():
            self._write(path, asdict(Credentials.random()))
        try:
            stored = json.loads(path.read_text())
            credentials = Credentials.of(stored)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise FailedPrecondition(
                f"{path} is damaged",
                hint="Restore it from a copy; deleting it makes new credentials for the same data.",
            ) from error
        if asdict(credentials) != stored:
            self._write(path, asdict(credentials))
        return credentials

    def ports(self) -> dict[str, int]:
        """The ports of the last start; empty when there was none or the file is damaged."""
        try:
            return {str(name): int(port) for name, port in json.loads((self.root / "ports.json").read_text()).items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    def remember(self, ports: dict[str, int]) -> None:
        self._write(self.root / "ports.json", ports)

    def describe(self, info: StackInfo) -> None:
        self._write(self.root / "stack.json", asdict(info))

    def info(self) -> StackInfo:
        """What runs. A description that its supervisor left behind when it was killed counts as stopped."""
        try:
            raw: dict[str, Any] = json.loads((self.root / "stack.json").read_text())
        except FileNotFoundError:
            return StackInfo(StackState.STOPPED)
        processes = {name: ProcessInfo(**process) for name, process in raw["processes"].items()}
        info = StackInfo(StackState(raw["state"]), raw["pid"], processes, raw["error"])
        if self.supervisor() is None:
            info.processes = {}
            if info.state is not StackState.FAILED:
                info.state = StackState.STOPPED
        return info

    def _write(self, path: Path, content: object) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
