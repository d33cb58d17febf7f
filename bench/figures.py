"""How the benchmarks of inference count and print."""

from __future__ import annotations

from pathlib import Path


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(what: str, measured: str, asked: str = "") -> None:
    """One figure, beside what was asked of it."""
    print(f"{what:36} {measured}" + (f"   (asked: {asked})" if asked else ""), flush=True)


def milliseconds(values: list[float]) -> str:
    """Median and 95th percentile of seconds, in milliseconds."""
    return f"p50 {percentile(values, 0.5) * 1e3:.1f} ms, p95 {percentile(values, 0.95) * 1e3:.1f} ms"


class Stolen:
    """How much of this machine's processors its host gave to others: figures of such a time say less, and those of two
    times compare only where it is small in both."""

    def __init__(self) -> None:
        self._last = _ticks()

    def share(self) -> str:
        """Of all processor time since the last call."""
        now = _ticks()
        passed = [after - before for after, before in zip(now, self._last, strict=True)]
        self._last = now
        return f"{passed[_STEAL] / max(1, sum(passed)):.0%}"


_STEAL, _KINDS = 7, 8
"""Of the times in /proc/stat (proc(5)): the eighth is stolen; guests' times, which follow, are part of the others."""


def _ticks() -> list[int]:
    name, *ticks = Path("/proc/stat").read_text().splitlines()[0].split()
    assert name == "cpu"
    return [int(each) for each in ticks[:_KINDS]]
