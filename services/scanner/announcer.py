"""Publishes an event for every state that a scan reaches, whichever process brought it there.

The record is the truth; this only follows it. Several replicas may announce the same: the event's id is the same, too.
"""

from __future__ import annotations

from datetime import UTC, datetime

from codegraft.event.v1.events_pb2 import ScanChanged
from codegraft.scanner.v1.scan_pb2 import Scan
from services.core import log
from services.core.errors import StateUnavailable
from services.core.events import EventBus
from services.core.jobs import is_final
from services.core.state import Table

TYPE = "codegraft.scanner.scan.changed.v1"

logger = log.get(__name__)


async def announce(scans: Table[Scan], events: EventBus) -> None:
    """Follows the scans until it is cancelled. What ended before it started is no news."""
    started = datetime.now(UTC)
    announced: dict[str, tuple[int, int]] = {}
    async for scan in scans.watch_all():
        status = scan.status
        state = (status.epoch, status.state)
        if announced.get(scan.name) == state:
            continue
        announced[scan.name] = state
        if is_final(status):
            del announced[scan.name]
            if status.end_time.ToDatetime(tzinfo=UTC) < started:
                continue
        try:
            await events.publish(
                TYPE,
                scan.name,
                ScanChanged(scan=scan.name, state=status.state),
                id=f"{scan.name}@{status.epoch}-{status.state}",
            )
        except StateUnavailable as error:
            logger.warning("an event could not be published", scan=scan.name, error=str(error))
