"""How a client shows who it is, and how it knows that a service is one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from services.client.addresses import Addresses, folder_of, running
from services.core.rpc.tls import ClientFiles


@dataclass(frozen=True, slots=True)
class Access:
    """What goes with every call."""

    key: str = field(default="", repr=False)
    """API key or OIDC token; empty sends none."""
    tls: ClientFiles | None = None
    """Certificates; None calls without TLS."""

    @classmethod
    def find(cls, addresses: Addresses, data: Path | None = None) -> Access:
        """What the environment gives (``CODEGRAFT_API_KEY``, ``CODEGRAFT_TLS_CA_FILE`` and so on), else the local
        stack's key, which goes to no other addresses than the stack's.

        Args:
            data: data folder of the local stack, in place of the environment's key; None means ``CODEGRAFT_DATA`` or
                the default one.
        """
        key = os.environ.get("CODEGRAFT_API_KEY", "") if data is None else ""
        folder = folder_of(data)
        if _is_stack(addresses, folder):  # which speaks no TLS
            return cls(key or _stacks_key(folder))
        return cls(key, _tls())


NONE = Access()
"""Neither key nor certificates."""


def _is_stack(addresses: Addresses, folder: Path) -> bool:
    try:
        return running(folder) == addresses
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stacks_key(folder: Path) -> str:
    """Empty when an older version made the stack."""
    try:
        return str(json.loads((folder / "credentials.json").read_text())["api_key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _tls() -> ClientFiles | None:
    ca, cert, key = (_path(f"CODEGRAFT_TLS_{name}_FILE") for name in ("CA", "CERT", "KEY"))
    return ClientFiles(ca, cert, key) if ca is not None else None


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None
