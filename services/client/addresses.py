"""Where the four services are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from services.core.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Addresses:
    """gRPC addresses, each host:port or a gRPC target (``dns:///inference:50054`` balances over all its replicas)."""

    ingest: str
    """Projects, sources, uploads, snapshots."""
    scanner: str
    """Scans, verdicts, datasets."""
    trainer: str
    """Runs, checkpoints, the model catalogue."""
    inference: str
    """Completions, chat, serving policy."""

    @classmethod
    def find(cls, data: Path | None = None) -> Addresses:
        """The addresses that the environment names (``CODEGRAFT_INGEST_ADDRESS`` and so on), else the local stack's.

        Args:
            data: data folder of the local stack; None means ``CODEGRAFT_DATA`` or the default one.

        Raises:
            Unavailable: neither is there.
        """
        names = [field.name for field in fields(cls)]
        given = {name: os.environ.get(f"CODEGRAFT_{name.upper()}_ADDRESS", "") for name in names}
        if data is None and all(given.values()):
            return cls(**given)
        folder = folder_of(data)
        try:
            there = running(folder)
        except (OSError, ValueError, KeyError, TypeError):
            raise Unavailable(
                f"no local stack runs in {folder}",
                hint="Start one with `codegraft up --detach`, or set CODEGRAFT_INGEST_ADDRESS, "
                "CODEGRAFT_SCANNER_ADDRESS, CODEGRAFT_TRAINER_ADDRESS and CODEGRAFT_INFERENCE_ADDRESS.",
            ) from None
        return replace(there, **{name: address for name, address in given.items() if address and data is None})


def running(folder: Path) -> Addresses:
    """The addresses of the local stack in the folder.

    Raises:
        OSError, ValueError, KeyError, TypeError: none runs there, or its description is damaged.
    """
    processes = json.loads((folder / "stack.json").read_text())["processes"]
    return Addresses(**{field.name: str(processes[field.name]["address"]) for field in fields(Addresses)})


def folder_of(data: Path | None) -> Path:
    """The local stack's data folder: the given one, else ``CODEGRAFT_DATA``, else the default one."""
    return (data or Path(os.environ.get("CODEGRAFT_DATA") or default_data())).expanduser()


def default_data() -> Path:
    """The local stack's data folder when none is named: in the user's XDG data folder."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "codegraft"
