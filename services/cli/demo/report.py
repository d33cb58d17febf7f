"""What the demo found, as a closing table and as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.cli.demo.editor import Swap
from services.cli.output import err, out, print_table
from services.client.words import duration
from services.core.places import Place, Score, first_line

EXAMPLES = 5


@dataclass(slots=True)
class Figures:
    """The closing figures; losses in nats per token."""

    base_loss: float = 0.0
    """Of the base model on all held-out files."""
    adapter_loss: float = 0.0
    source_losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(base, adapter) on each source's held-out files."""
    base: Score | None = None
    adapter: Score | None = None
    places: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each phase."""
    swap: Swap | None = None
    train_steps: int = 0
    train_tokens: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a phase."""
        err.rule(name, style="dim")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def add_run(self, events: Sequence[RunEvent], swap: Swap) -> None:
        """Takes losses before and after, and the swap."""
        self.swap = swap
        evaluations = [event.evaluation for event in events if event.HasField("evaluation")]
        base = evaluations[0]
        published = [event.best.step for event in events if event.HasField("best")][-1]
        best = next(evaluation for evaluation in evaluations if evaluation.step == published)
        self.base_loss, self.adapter_loss = base.test_loss, best.test_loss
        for source, loss in sorted(base.source_losses.items()):
            self.source_losses[source.rsplit("/", 1)[1]] = (loss, best.source_losses[source])
        steps = [event.step for event in events if event.HasField("step")]
        self.train_steps, self.train_tokens = steps[-1].step, steps[-1].tokens


def show(figures: Figures, picture: Path) -> None:
    """Prints the closing table."""
    err.rule("what came of it", style="dim")
    rows: list[list[object]] = []
    rows.append(["held-out loss, all", *_loss(figures.base_loss, figures.adapter_loss)])
    for source, (before, after) in figures.source_losses.items():
        rows.append([f"held-out loss, {source}", *_loss(before, after)])
    if figures.base and figures.adapter:
        base, adapter = figures.base, figures.adapter
        rows.append(
            [f"next-line exact match ({figures.places} places)", *_share(base.exact_match, adapter.exact_match)]
        )
        rows.append(["next-line edit similarity", *_share(base.edit_similarity, adapter.edit_similarity)])
    print_table(["", "BASE", "ADAPTER", "CHANGE"], rows, empty="")
    timings: list[list[object]] = [[phase, duration(seconds)] for phase, seconds in figures.seconds.items()]
    if figures.swap:
        swap = figures.swap
        latency = f"{swap.first_token_seconds:.2f} s" if swap.first_token_seconds is not None else "-"
        timings.append(["swap: best published -> first token on it", latency])
        timings.append(["streams over the swap", f"{swap.over_the_swap} of {swap.streams}"])
        timings.append(["streams broken by the swap", str(swap.broken)])
    timings.append(["trained", f"{figures.train_steps} steps, {figures.train_tokens:,} tokens"])
    print_table(["", "TIME"], timings, empty="")
    err.print(f"loss curves: {picture}")


def show_examples(places: Sequence[Place], base: Sequence[str], adapted: Sequence[str]) -> None:
    """Prints the places at which the two versions differ most usefully: where the adapter got it right first."""
    order = sorted(range(len(places)), key=lambda i: (adapted[i].strip() != places[i].expected, base[i] == adapted[i]))
    for i in order[:EXAMPLES]:
        place = places[i]
        above = place.prefix.rstrip(" ").rstrip("\n").splitlines()[-2:]
        out.print(f"{place.path}", style="bold")
        for line in above:
            out.print(f"    {line}", style="dim")
        out.print(f"    expected  {place.expected}")
        out.print(f"    base      {first_line(base[i])}")
        out.print(f"    adapter   {first_line(adapted[i])}")


def _loss(before: float, after: float) -> list[str]:
    return [f"{before:.4f}", f"{after:.4f}", f"{100 * (after / before - 1):+.1f} %"]


def _share(before: float, after: float) -> list[str]:
    return [f"{100 * before:.1f} %", f"{100 * after:.1f} %", f"{100 * (after - before):+.1f} points"]
