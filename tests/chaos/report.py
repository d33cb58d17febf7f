"""The table of what was done to a stack and how long it took to be well again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.core.jobs import is_final
from tests.chaos.faults import WORKERS, Fault
from tests.chaos.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault. Times in seconds; None where there was nothing to measure."""

    kind: str
    times: int
    recovery_median: float
    """From the restart, or the end of the fault, to the first call that was answered."""
    recovery_worst: float
    resumed: int
    """Jobs that ran at the time and went on in another attempt."""
    resume_median: float | None
    """From the fault to that attempt's begin."""
    resume_worst: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What is kept of a run."""

    seed: int
    seconds: float
    rows: Sequence[Row]
    jobs: Mapping[str, int]
    """Acknowledged ones, by the service that works on them."""
    unended: Sequence[str]
    failed: Sequence[str]
    """Why jobs failed that met more faults than they have attempts."""
    completions: int
    broken: dict[str, int]
    artifacts: Mapping[str, int]
    """Acknowledged ones that were looked at in the end, by kind; none when it did not come to that."""
    lost: Sequence[str]

    @classmethod
    def of(
        cls,
        seed: int,
        seconds: float,
        faults: Sequence[Fault],
        ledger: Ledger,
        artifacts: Mapping[str, int],
        lost: Sequence[str],
    ) -> Report:
        kinds = sorted({fault.kind for fault in faults})
        rows = [_row(kind, faults, ledger) for kind in kinds]
        jobs = {worker: sum(job.worker == worker for job in ledger.jobs) for worker in WORKERS}
        unended = [job.name for job in ledger.jobs if not is_final(job.status)]
        failed = [f"{job.name}: {job.status.failure.message}" for job in ledger.jobs if job.status.failure.reason]
        return cls(seed, seconds, rows, jobs, unended, failed, ledger.completions, ledger.broken, dict(artifacts), lost)

    def table(self) -> str:
        """In Markdown."""
        lines = [
            "| fault | times | well again: median | worst | jobs that went on | after: median | worst |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            figures = (row.recovery_median, row.recovery_worst, row.resume_median, row.resume_worst)
            first, second, third, fourth = (f"{each:.1f} s" if each is not None else "" for each in figures)
            lines.append(f"| {row.kind} | {row.times} | {first} | {second} | {row.resumed} | {third} | {fourth} |")
        told = {
            kind: ", ".join(f"{count} {name}" for name, count in sorted(some.items())) or "none"
            for kind, some in (("broken", self.broken), ("artifacts", self.artifacts))
        }
        lines += [
            "",
            f"{sum(row.times for row in self.rows)} faults in {self.seconds:.0f} s (seed {self.seed}). "
            f"{self.jobs['scanner']} scans and {self.jobs['trainer']} runs were acknowledged: {len(self.unended)} did "
            f"not end, {len(self.failed)} ended FAILED. {self.completions} completions; broken off: {told['broken']}. "
            f"Acknowledged artifacts looked at: {told['artifacts']}; lost: {len(self.lost)}.",
            *(f"- did not end: {name}" for name in self.unended),
            *(f"- failed: {why}" for why in self.failed),
            *(f"- lost: {why}" for why in self.lost),
        ]
        return "\n".join(lines)

    def keep(self, folder: Path) -> None:
        """As chaos.md and chaos.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chaos.md").write_text(self.table() + "\n")
        (folder / "chaos.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def _row(kind: str, faults: Sequence[Fault], ledger: Ledger) -> Row:
    mine = [fault for fault in faults if fault.kind == kind]
    recoveries = [fault.well - fault.over for fault in mine]
    resumes = []
    for fault in mine:
        if fault.service in WORKERS:
            later = [each.began for each in faults if each.service == fault.service and each.began > fault.began]
            jobs = [job for job in ledger.jobs if job.worker == fault.service]
            found = [job.resumed_after(fault.began, min(later, default=math.inf)) for job in jobs]
            resumes += [after for after in found if after is not None]
    return Row(
        kind,
        len(mine),
        statistics.median(recoveries),
        max(recoveries),
        len(resumes),
        statistics.median(resumes) if resumes else None,
        max(resumes, default=None),
    )
