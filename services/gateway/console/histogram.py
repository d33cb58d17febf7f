"""The losses of a scan's files as bars, and what a threshold would change."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from codegraft.scanner.v1.scan_pb2 import LossBin, Scan
from codegraft.scanner.v1.verdict_pb2 import VERDICT_REASON_HIGH_LOSS, VerdictFilter
from services.client.aio.scanner import Scans

DEFAULT_THRESHOLD = 3.0
"""Nats per token; the scanner's when a scan asks for none."""
WIDTH, HEIGHT = 760.0, 200.0
"""Of the picture, in its own units."""
_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin, as two rectangles above each other."""

    x: float
    width: float
    accepted_y: float
    accepted_height: float
    rejected_y: float
    rejected_height: float
    bin: LossBin


@dataclass(frozen=True, slots=True)
class Histogram:
    """The picture."""

    bars: Sequence[Bar]
    low: float
    """Loss at its left edge, nats per token."""
    high: float
    threshold: float

    @property
    def at(self) -> float:
        """Where the threshold stands."""
        share = (self.threshold - self.low) / (self.high - self.low)
        return WIDTH * min(1.0, max(0.0, share))


def of(scan: Scan) -> Histogram | None:
    """The histogram of a scan; None when it has no losses."""
    bins = list(scan.report.loss_bins)
    if not bins:
        return None
    threshold = scan.settings.max_loss if scan.settings.HasField("max_loss") else DEFAULT_THRESHOLD
    low, high = min(0.0, bins[0].low), max(bins[-1].high, threshold)  # it has to be in the picture to be dragged
    if not high > low:
        high = low + 1
    most, wide = max(each.accepted + each.rejected for each in bins), WIDTH / (high - low)
    bars = []
    for each in bins:
        accepted, rejected = HEIGHT * each.accepted / most, HEIGHT * each.rejected / most
        width = max(1.0, (each.high - each.low) * wide - 1)
        top = HEIGHT - accepted
        bars.append(Bar((each.low - low) * wide, width, top, accepted, top - rejected, rejected, each))
    return Histogram(bars, low, high, threshold)


@dataclass(frozen=True, slots=True)
class Preview:
    """What another threshold would change."""

    leaving: int
    """Files that are accepted now and would be rejected."""
    coming: int
    """Files that are rejected for their loss now and would be accepted."""
    leaving_paths: list[str]
    coming_paths: list[str]


async def preview(scans: Scans, scan: str, threshold: float) -> Preview:
    """Asks the scanner, which counts exactly.

    Raises:
        ScanNotFound: there is none of that name.
    """
    over = VerdictFilter(accepted=True, min_loss=math.nextafter(threshold, math.inf))  # a loss of just this stays
    under = VerdictFilter(accepted=False, reasons=[VERDICT_REASON_HIGH_LOSS], max_loss=threshold)
    leaving, coming = await asyncio.gather(
        *(scans.verdict_page(scan, each, page_size=_EXAMPLES) for each in (over, under))
    )
    return Preview(
        leaving.total_count,
        coming.total_count,
        [each.path for each in leaving.verdicts],
        [each.path for each in coming.verdicts],
    )
