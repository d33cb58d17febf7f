"""Rows of a batch: documents side by side, as full as they get.

Documents that share a row do not see each other: positions start at 0 for each, and the model builds its mask from that
(services/trainer/model/lora).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

IGNORED = -100
"""Label of a position without a loss, as in services/trainer/model/loss (which needs torch)."""

_SMALLEST_SHARE = 64
"""A gap below this part of a row stays empty: so few tokens, without what came before them, teach little."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch; the three lists are equally long."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """The next token of each position, or IGNORED where there is none."""
    positions: list[int] = field(default_factory=list)
    """Position within the document, from 0."""

    def add(self, ids: Sequence[int], start: int, end: int) -> None:
        """Appends the positions [start, end) of a document; there has to be a token at end."""
        self.ids.extend(ids[start:end])
        self.labels.extend(ids[start + 1 : end + 1])
        self.positions.extend(range(end - start))


def pack(documents: Iterable[Sequence[int]], window: int, *, whole: Iterable[Sequence[int]] = ()) -> list[Row]:
    """Rows of at most ``window`` positions that hold every token but the first of each document as a label, once.

    Best fit decreasing (arXiv:2404.10830) for the documents that have to stay whole; the others fill what is left, and
    go on in the next gap where one ends.

    Args:
        documents: of any length.
        whole: further ones of at most window + 1 tokens that are never divided: what fills in a middle needs its prefix
            and suffix in sight.
    """
    rows: list[Row] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for ids in sorted(whole, key=len, reverse=True):
        size = len(ids) - 1
        if size < 1:
            continue
        at = bisect_left(rooms, (size, 0))
        room, number = rooms.pop(at) if at < len(rooms) else (window, len(rows))
        if number == len(rows):
            rows.append(Row())
        rows[number].add(ids, 0, size)
        insort(rooms, (room - size, number))
    gaps = deque(row for row in rows if window - len(row.ids) > window // _SMALLEST_SHARE)
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            if not gaps:
                rows.append(Row())
                gaps.append(rows[-1])
            end = min(start + window - len(gaps[0].ids), len(ids) - 1)
            gaps[0].add(ids, start, end)
            start = end
            if window - len(gaps[0].ids) <= window // _SMALLEST_SHARE:
                gaps.popleft()
    return rows


def padded(rows: Sequence[Row], pad_id: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """ids, labels and positions of equal length: shorter rows end in a document of padding without a loss."""
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    return (
        [row.ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)],
        [row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)],
        [row.positions + list(range(gap)) for row, gap in zip(rows, gaps, strict=True)],
    )
