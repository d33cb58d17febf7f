"""Counts of a scan: by reason, by language, by part."""

from __future__ import annotations

from collections.abc import Sequence

from codegraft.scanner.v1.scan_pb2 import ScanCount, ScanReport
from services.scanner.verdict import Verdict


def summarize(
    verdicts: Sequence[Verdict], *, stage1_seconds: float, stage2_seconds: float, cached_losses: int
) -> ScanReport:
    """The report; its accepted and rejected counts add up to the number of verdicts."""
    report = ScanReport(
        file_count=len(verdicts),
        stage1_seconds=stage1_seconds,
        stage2_seconds=stage2_seconds,
        cached_losses=cached_losses,
    )
    for verdict in verdicts:
        _count(report.reasons[verdict.reason], verdict)
        if verdict.accepted:
            report.accepted_count += 1
            _count(report.languages[verdict.language], verdict)
            _count(report.test if verdict.split == "TEST" else report.train, verdict)
        else:
            report.rejected_count += 1
    return report


def _count(count: ScanCount, verdict: Verdict) -> None:
    count.files += 1
    count.bytes += verdict.size
    count.tokens += verdict.tokens
