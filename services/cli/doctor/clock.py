"""Clocks: leases of jobs compare those of the services, and signatures at the object store end when one is far off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime

import nats.errors
import urllib3
from urllib3.exceptions import HTTPError

from services.cli.control.installation import Control, Installation
from services.cli.doctor.check import Check, failed, ok, warning
from services.cli.doctor.services import Told
from services.core.state.nats import stream_of

TOLERATED = 1.0
"""Seconds between two clocks that the operating guide allows."""
BROKEN = 10.0
"""Seconds from which leases, which last 30, are no longer kept."""
_HINT = "Run NTP (chrony, systemd-timesyncd) on every node, this one too."
_TIMEOUT = 5.0


def skew(at: float, before: float, after: float, resolution: float = 0.0) -> float:
    """Seconds by which a server's clock is at least ahead of ours; negative when it is behind.

    Args:
        at: what it said, in seconds since 1970.
        before: our clock when we asked, and ``after`` when the answer was here: it spoke in between.
        resolution: seconds that it may have cut off.
    """
    if at > after:
        return at - after
    if at + resolution < before:
        return at + resolution - before
    return 0.0


def judge(name: str, seconds: float) -> Check:
    """The check of a clock that is so many seconds ahead."""
    name = f"clock of {name}"
    if abs(seconds) <= TOLERATED:
        return ok(name, "agrees with this machine's")
    found = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    return (failed if abs(seconds) > BROKEN else warning)(name, found, _HINT)


def check_services(told: Mapping[str, Told]) -> list[Check]:
    """The services' clocks, of those that answered."""
    return [judge(name, skew(one.time, one.before, one.after)) for name, one in told.items() if one.time]


async def check_store(place: Installation) -> list[Check]:
    """The object store's clock, by the Date of any answer."""
    scheme = "https" if place.settings.s3_secure else "http"
    try:
        before = time.time()
        answer = await asyncio.to_thread(_head, f"{scheme}://{place.settings.s3_endpoint}/")
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (HTTPError, KeyError, ValueError, TypeError):
        return []  # that it does not answer, others tell
    return [judge("object store", skew(date, before, time.time(), resolution=1.0))]


def _head(url: str) -> urllib3.BaseHTTPResponse:
    return urllib3.PoolManager(timeout=_TIMEOUT, retries=False).request("HEAD", url)


async def check_nats(control: Control) -> list[Check]:
    """The clock of NATS, which every look at a stream tells."""
    for bucket in ("access", "ingest"):  # every user may look at the first
        try:
            before = time.time()
            answer = await control.nats.client.request(
                f"$JS.API.STREAM.INFO.{stream_of(bucket)}", b"", timeout=_TIMEOUT
            )
            at = json.loads(answer.data).get("ts")
        except (nats.errors.Error, TimeoutError, ValueError):
            continue
        if at:
            return [judge("NATS", skew(datetime.fromisoformat(at).timestamp(), before, time.time()))]
    return []
