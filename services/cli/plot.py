"""Pictures: the curves of a run, the losses of a scan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from codegraft.scanner.v1.scan_pb2 import ScanReport
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.core.errors import FailedPrecondition

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Curves:
    """Loss in nats per token, and the learning rate, by optimizer step; step 0 of the test loss is the base model."""

    train: list[tuple[int, float]] = field(default_factory=list)
    test: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    learning_rate: list[tuple[int, float]] = field(default_factory=list)


def curves(events: Iterable[RunEvent]) -> Curves:
    """Collects the curves from a run's story."""
    found = Curves()
    for event in events:
        if event.HasField("step"):
            found.train.append((event.step.step, event.step.train_loss))
            found.learning_rate.append((event.step.step, event.step.learning_rate))
        elif event.HasField("evaluation"):
            found.test.append((event.evaluation.step, event.evaluation.test_loss))
        elif event.HasField("best"):
            found.best = (event.best.step, event.best.test_loss)
    return found


def draw(found: Curves, title: str, target: Path) -> None:
    """Draws the losses and, below them, the learning rate into an image; the suffix of the name chooses the format.

    Raises:
        FailedPrecondition: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    figure = _figure((8, 5.5))
    if not found.train and not found.test:
        raise FailedPrecondition("the run has no loss yet", hint="Wait for its first steps.")
    axes, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot(*_columns(found.train), color="#9db4d6", linewidth=1, label="train")
    axes.plot(*_columns(found.test), color="#1f4e9e", marker="o", markersize=4, label="test (held out)")
    if found.best is not None:
        axes.annotate(
            f"best {found.best[1]:.3f}",
            xy=found.best,
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            color="#1f4e9e",
        )
        axes.plot([found.best[0]], [found.best[1]], marker="*", markersize=13, color="#d9822b", linestyle="none")
    axes.set(title=title, ylabel="loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    rate.plot(*_columns(found.learning_rate), color="#6b7a90", linewidth=1)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    rate.grid(alpha=0.25)
    _save(figure, target)


def draw_losses(report: ScanReport, title: str, target: Path) -> None:
    """Draws how the losses of a scan lie, and how many files have which reason, into an image.

    Raises:
        FailedPrecondition: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure((11, 4.5))
    histogram, table = figure.subplots(1, 2, width_ratios=[2, 1])
    lows = [bin.low for bin in report.loss_bins]
    width = report.loss_bins[0].high - report.loss_bins[0].low
    accepted = [bin.accepted for bin in report.loss_bins]
    histogram.bar(lows, accepted, width, align="edge", color="#1f4e9e", label="accepted")
    rejected = [bin.rejected for bin in report.loss_bins]
    histogram.bar(lows, rejected, width, accepted, align="edge", color="#d9822b", label="rejected")
    histogram.set(title=title, xlabel="loss, nats per token", ylabel="files")
    histogram.grid(alpha=0.25)
    histogram.legend(frameon=False)
    reasons = sorted(report.reasons.items(), key=lambda item: (item[0] != "ACCEPTED", item[1].files))
    table.barh([reason for reason, _ in reasons[::-1]], [count.files for _, count in reasons[::-1]], color="#9db4d6")
    for row, (_, count) in enumerate(reasons[::-1]):
        table.text(count.files, row, f" {count.files:,}", va="center")
    table.set(title="files by reason")
    table.margins(x=0.2)
    table.spines[["top", "right"]].set_visible(False)
    _save(figure, target)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FailedPrecondition("matplotlib is not installed", hint="pip install 'codegraft[plot]'") from error
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, target: Path) -> None:
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"{target} cannot be written: {error}", hint="Choose another --output.") from error


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
