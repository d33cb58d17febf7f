"""The scanner's figures."""

from __future__ import annotations

from services.core.telemetry.metrics import LONG, counter, histogram

STAGE_SECONDS = histogram(
    "codegraft_scanner_stage_seconds",
    "Stages of scans: 1 (rules and duplicates), 2 (losses), 3 (verdicts and dataset), and how long they took.",
    "stage",
    buckets=LONG,
)
FILES = counter("codegraft_scanner_files_total", "Files that got a verdict, by its primary reason.", "reason")
