"""Counts of a scan: by reason, by language, by licence, by part; and what deserves a look."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from codegraft.scanner.v1.scan_pb2 import LanguageLoss, LossBin, ScanCount, ScanReport
from services.scanner.loss import Threshold
from services.scanner.verdict import Reason, Verdict

SILENT_SHARE = 0.05
"""Of a language's files: more than this lost to stage 2 is told."""
BIN = 0.1
"""Nats per token that a bin of the histogram covers."""
MIN_TOLD = 20
"""Files of a language from which on a share of them says something."""


def summarize(
    verdicts: Sequence[Verdict],
    *,
    thresholds: Mapping[str, Threshold] | None = None,
    stage1_seconds: float = 0,
    stage2_seconds: float = 0,
    cached_losses: int = 0,
) -> ScanReport:
    """The report; its accepted and rejected counts add up to the number of verdicts.

    Args:
        thresholds: what stage 2 asked of each language.
    """
    report = ScanReport(
        file_count=len(verdicts),
        stage1_seconds=stage1_seconds,
        stage2_seconds=stage2_seconds,
        cached_losses=cached_losses,
    )
    lost: Counter[str] = Counter()
    bins: defaultdict[int, LossBin] = defaultdict(LossBin)
    for verdict in verdicts:
        _count(report.reasons[verdict.reason], verdict)
        _count(report.all_languages[verdict.language], verdict)
        if verdict.license:
            _count(report.licenses[verdict.license], verdict)
        if verdict.loss is not None:
            bin = bins[int(verdict.loss / BIN)]
            bin.accepted += verdict.accepted
            bin.rejected += not verdict.accepted
        if verdict.accepted:
            report.accepted_count += 1
            _count(report.languages[verdict.language], verdict)
            _count(report.test if verdict.split == "TEST" else report.train, verdict)
        else:
            report.rejected_count += 1
            lost[verdict.language] += verdict.reason == Reason.HIGH_LOSS.name
    for number, bin in sorted(bins.items()):
        bin.low, bin.high = round(number * BIN, 6), round((number + 1) * BIN, 6)
        report.loss_bins.append(bin)
    for language, threshold in sorted((thresholds or {}).items()):
        if not threshold.files:
            continue
        report.losses[language].CopyFrom(
            LanguageLoss(
                files=threshold.files,
                median=threshold.median,
                mad=threshold.mad,
                threshold=threshold.value,
                rejected=lost[language],
            )
        )
        share = lost[language] / threshold.files
        if share > SILENT_SHARE and threshold.files >= MIN_TOLD:
            report.warnings.append(
                f"{language} loses {share:.0%} of its files ({lost[language]} of {threshold.files}) to a loss over "
                f"{threshold.value:.2f}; half of them are over {threshold.median:.2f}"
            )
    return report


def _count(count: ScanCount, verdict: Verdict) -> None:
    count.files += 1
    count.bytes += verdict.size
    count.tokens += verdict.tokens
