"""A step's sequences side by side, in plain numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.inference.adapters.lora import Segment
from services.inference.engine.rows import Row
from services.inference.engine.scheduler import Work


@dataclass(slots=True)
class Layout:
    """All tokens of a step, without padding."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """Where each one's keys and values go."""
    begun: list[int] = field(default_factory=list)
    """Slots to be cleared, see :meth:`Row.begun`."""
    last: list[int] = field(default_factory=list)
    """Tokens whose outputs are wanted."""
    rows: list[Row] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    """What runs on adapters."""


def lay_out(work: Iterable[Work]) -> Layout:
    """The work's tokens in its order; neighbours on one adapter are one segment."""
    made = Layout()
    ids, segments = made.ids, made.segments
    for item in work:
        begin = len(ids)
        ids += item.tokens
        count = len(ids) - begin
        made.positions += range(item.start, item.start + count)
        assert item.sequence.table is not None
        row = Row(begin, count, item.start, item.sequence.table.blocks)
        made.rows.append(row)
        made.slots += row.written()
        made.begun += row.begun()
        made.last += range(len(ids) - item.outputs, len(ids))
        if (weights := item.sequence.adapter) is not None:
            if segments and segments[-1].weights is weights and segments[-1].end == begin:
                segments[-1] = Segment(segments[-1].begin, len(ids), weights)
            else:
                segments.append(Segment(begin, len(ids), weights))
    return made
