"""What a project may use, and what it uses of it, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

from codegraft.access.v1.quota_pb2 import Limits, StorageUsage
from services.core.errors import PermissionDenied, Unavailable
from services.core.quota.limits import WORDS, Kind
from services.gateway.console import words
from services.gateway.console.visit import Visit


@dataclass(frozen=True, slots=True)
class Row:
    """One limit."""

    words: str
    used: str
    """Empty where no service says."""
    limit: str
    share: float | None = None
    """Of the limit that is used, at most 1; None without one."""
    parts: tuple[tuple[str, str], ...] = ()
    """What it is used for: (what, how much)."""


async def rows(visit: Visit) -> list[Row]:
    """All limits of the visit's project; empty where the key may not see them, or a service does not answer."""
    owner = f"projects/{visit.project}"
    try:
        limits = (await visit.client.quotas.get(owner)).effective
        return table(limits, await visit.client.quotas.usage(owner), await visit.client.quotas.stored(owner))
    except (PermissionDenied, Unavailable):
        return []


def table(limits: Limits, used: Limits, stored: StorageUsage) -> list[Row]:
    """The rows."""
    found = []
    for kind in Kind:
        told = words.size if kind is Kind.STORAGE else words.count
        limit = getattr(limits, kind) if limits.HasField(kind) else None
        amount = getattr(used, kind) if used.HasField(kind) else None
        parts = [(field.name.replace("_", " "), words.size(size)) for field, size in stored.ListFields()]
        found.append(
            Row(
                WORDS[kind].removeprefix("bytes of "),
                "" if amount is None else told(amount),
                "no limit" if limit is None else told(limit),
                None if limit is None or amount is None else min(1.0, amount / limit if limit else 1.0),
                tuple(parts) if kind is Kind.STORAGE else (),
            )
        )
    return found
