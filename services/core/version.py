"""The release of this installation, as every service tells it to who asks for its health."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def release() -> str:
    """The version of the distribution, for example "0.1.0"; "unknown" where it runs without having been installed."""
    try:
        return version("codegraft")
    except PackageNotFoundError:
        return "unknown"
