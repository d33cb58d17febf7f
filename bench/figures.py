"""How the benchmarks of inference count and print."""

from __future__ import annotations


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
