"""NATS, S3 and one ingest process of their own, for benchmarks; and the material they work on."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography.fernet import Fernet

from bench.servers import servers
from services.cli.local import ports
from services.cli.local.process import Child
from services.client import Addresses, Codegraft
from services.core.errors import Unavailable
from services.core.store.s3 import S3Address


@dataclass
class Stage:
    """What runs."""

    folder: Path
    client: Codegraft
    s3: S3Address
    child: Child
    environment: dict[str, str]
    address: str

    def resident(self) -> float:
        """The ingest process's highest resident memory so far, in MB."""
        text = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1000

    def forget_peak(self) -> float:
        """Begins to measure the highest resident memory anew; returns what is resident now, in MB."""
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")
        return self.resident()

    def restart(self) -> None:
        """Kills the ingest process and starts it anew."""
        self.child.stop(timedelta(seconds=10))
        self.child = _ingest(self.folder, self.environment)
        _await(self.client)


@contextmanager
def stage(**settings: str) -> Iterator[Stage]:
    """Starts everything in a temporary folder and ends it all."""
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as name, servers(Path(name)) as (found, store):
        folder = Path(name)
        address = f"{ports.HOST}:{ports.choose(['ingest'], {})['ingest']}"
        environment = {
            **found,
            "CODEGRAFT_LISTEN": address,
            "CODEGRAFT_CACHE_DIR": str(folder / "cache"),
            "CODEGRAFT_INGEST_CREDENTIAL_KEYS": f'["{Fernet.generate_key().decode()}"]',
            "CODEGRAFT_INGEST_ALLOWED_NETWORKS": '["127.0.0.0/8"]',
            **settings,
        }
        child = _ingest(folder, environment)
        try:
            with Codegraft(Addresses(address, address, address, address), timeout=600) as client:
                _await(client)
                running = Stage(folder, client, store, child, environment, address)
                yield running
                child = running.child
        finally:
            child.stop(timedelta(seconds=10))


def _ingest(folder: Path, environment: dict[str, str]) -> Child:
    return Child.start(
        "ingest", [sys.executable, "-m", "services.ingest"], log=folder / "ingest.log", env=environment, cwd=folder
    )


def _await(client: Codegraft) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            list(client.projects.list())
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


_AUTHOR = ("-c", "user.name=b", "-c", "user.email=b@example.com")


def git(repository: Path, *arguments: str) -> str:
    """Runs git as a person would."""
    command = ["git", "-C", str(repository), "-c", "gc.auto=0", *_AUTHOR, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def real_files(count: int) -> dict[str, bytes]:
    """Python files of the installed packages, which are real code by many hands."""
    top = Path(sysconfig.get_paths()["purelib"])
    found: dict[str, bytes] = {}
    for path in sorted(top.rglob("*.py")):
        data = path.read_bytes()
        if data and len(data) < 200_000:
            found[str(path.relative_to(top))] = data
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} files are installed")


def repository(folder: Path, files: dict[str, bytes], commits: int) -> Path:
    """A repository whose files came in over some commits, each of which also changes earlier ones."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    names = sorted(files)
    share = -(-len(names) // commits)
    for number in range(commits):
        for name in names[number * share : (number + 1) * share]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        for name in names[: number * share : 97]:
            (folder / name).write_bytes(files[name] + b"# revision %d\n" % number)
        git(folder, "add", "-A", "-f")
        git(folder, "commit", "-q", "-m", f"change {number}")
    git(folder, "gc", "-q")
    return folder
