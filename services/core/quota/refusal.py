"""The error of whoever is over a limit, and its figure."""

from __future__ import annotations

from services.core.errors import QuotaExceeded
from services.core.quota.limits import WORDS, Kind
from services.core.telemetry.figures import QUOTA_REFUSALS

_RATES = (Kind.REQUESTS, Kind.TOKENS)


def refuse(kind: Kind, owner: str, limit: int, used: int, asked: int, retry_after: float) -> QuotaExceeded:
    """The error to raise; counts it.

    Args:
        used: of the limit, now.
        asked: what there is no room for.
        retry_after: seconds until there may be.
    """
    QUOTA_REFUSALS.labels(kind, "project" if owner.startswith("projects/") else "key").inc()
    verb = "are there again by and by" if kind in _RATES else "are free once others end or are removed"
    return QuotaExceeded(
        f"{owner} may have {limit:,} {WORDS[kind]}, and uses {used:,}: there is no room for {asked:,} more",
        hint=f"Wait: they {verb}. Or ask an operator for more (`codegraft quota set`).",
        retry_after=max(retry_after, 0.001),
        quota=kind,
        owner=owner,
        limit=str(limit),
        used=str(used),
    )
