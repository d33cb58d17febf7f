"""The verdicts of a scan, stage by stage, over all files at once. No input or output: worker.py does that."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.scanner import duplicates, loss, split, stage1
from services.scanner.languages import Traits
from services.scanner.loss import FileLoss, Threshold
from services.scanner.rules import Rules
from services.scanner.secrets import Finder
from services.scanner.snapshot import File
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Finding, Reason, Split, Verdict, by_precedence


@dataclass(slots=True)
class Entry:
    """A file on its way to its verdict."""

    file: File
    traits: Traits
    encoding: str
    license: str
    fingerprint: str
    """See :class:`~services.scanner.stage1.Examined`."""
    characters: int
    """Length of its text."""
    utf8_bytes: int
    """Size of its text in UTF-8."""
    forced: bool
    findings: tuple[Finding, ...]
    """What speaks against it so far, the primary reason first."""
    text_sha256: str
    """Of its text where secrets were redacted, else of its content: what a loss belongs to."""
    redacted: str = ""
    """See :class:`~services.scanner.stage1.Examined`."""
    group: str = ""
    """Fingerprint of the file that stands for it in the split; empty for its own."""
    duplicate_of: str = ""
    similarity: float = 0.0
    loss: FileLoss | None = None

    @property
    def language(self) -> str:
        """By linguist's name; empty when unknown."""
        return self.traits.language

    @property
    def is_clean(self) -> bool:
        """Whether nothing speaks against it so far."""
        return not self.findings

    def add(self, finding: Finding) -> None:
        """Takes one more reason down."""
        self.findings = by_precedence([*self.findings, finding])


def examine(
    file: File, data: bytes | None, rules: Rules, masks: SourceMasks, finder: Finder | None = None
) -> tuple[Entry, str]:
    """Stage 1 for one file; its text comes back apart, so that nobody keeps all texts in memory."""
    found = stage1.examine(file.path, data, rules, masks, finder, size=file.size)
    utf8 = found.text.encode()
    entry = Entry(
        file=file,
        traits=found.traits,
        encoding=found.encoding,
        license=found.license,
        fingerprint=found.fingerprint,
        characters=len(found.text),
        utf8_bytes=len(utf8),
        forced=found.forced,
        findings=found.findings,
        text_sha256=hashlib.sha256(utf8).hexdigest() if found.redacted else file.sha256,
        redacted=found.redacted,
    )
    return entry, found.text


def mark_duplicates(entries: Sequence[Entry], shards: Sequence[Path], rules: Rules) -> None:
    """Rejects all but one of the files with the same or nearly the same text.

    Args:
        entries: by their keys.
        shards: the same, as stage 1's parts wrote them.
    """
    for key, duplicate in duplicates.find(shards, threshold=rules.near_threshold).items():
        entry, kept = entries[key], entries[duplicate.survivor]
        entry.group = kept.fingerprint
        if duplicate.similarity < 1 and not rules.near_duplicates:
            continue  # they stay, but on one side of the split
        where = f" of {kept.file.source}" if kept.file.source else ""  # a dry run has no sources
        entry.add(Finding(Reason.DUPLICATE, f"{duplicate.how} as {kept.file.path}{where}"))
        entry.duplicate_of = f"{kept.file.source}:{kept.file.path}"
        entry.similarity = duplicate.similarity


def judge_losses(entries: Sequence[Entry], losses: Mapping[str, FileLoss], rules: Rules) -> dict[str, Threshold]:
    """Stage 2 for every file that stage 1 left; returns what was asked of each language.

    Args:
        losses: by ``text_sha256``; has all of them.
    """
    measured = [(entry, losses[entry.text_sha256]) for entry in entries if entry.is_clean]
    thresholds = loss.thresholds([(entry.language, found) for entry, found in measured], rules)
    for entry, found in measured:
        entry.loss = found
        if finding := loss.judge(found, rules, thresholds[entry.language].value, forced=entry.forced):
            entry.add(finding)
    return thresholds


def conclude(entries: Sequence[Entry], rules: Rules) -> list[Verdict]:
    """The verdicts, in the order of the entries, with the accepted files split into train and test."""
    accepted = [entry for entry in entries if entry.is_clean]
    items = [
        split.Item(
            group=entry.group or entry.fingerprint,
            asked=entry.file.split,
            stratum=split.stratum(entry.language, entry.file.source, entry.file.path),
        )
        for entry in accepted
    ]
    parts = iter(split.assign(items, seed=rules.seed, share=rules.test_share))
    return [_verdict(entry, next(parts) if entry.is_clean else "") for entry in entries]


def _verdict(entry: Entry, part: Split) -> Verdict:
    told: dict[str, list[str]] = {}
    accepted = Finding(Reason.ACCEPTED, f"redacted: {entry.redacted}" if entry.redacted else "")
    for finding in entry.findings or (accepted,):
        told.setdefault(finding.reason.name, []).append(finding.detail)
    measured = entry.loss
    is_finite = measured is not None and math.isfinite(measured.loss)
    return Verdict(
        path=entry.file.path,
        source=entry.file.source,
        sha256=entry.file.sha256,
        size=entry.file.size,
        language=entry.language,
        split=part,
        accepted=entry.is_clean,
        stage=1 if measured is None else 2,
        reason=next(iter(told)),
        reasons=tuple(told),
        details=tuple("; ".join(filter(None, details)) for details in told.values()),
        encoding=entry.encoding,
        license=entry.license,
        duplicate_of=entry.duplicate_of,
        similarity=entry.similarity,
        loss=measured.loss if measured is not None and is_finite else None,
        bits_per_byte=measured.bits_per_byte(entry.utf8_bytes) if measured is not None and is_finite else None,
        tokens=measured.tokens if measured is not None else 0,
        sampled_tokens=measured.sampled_tokens if measured is not None else 0,
    )
