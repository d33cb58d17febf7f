"""Which files stage 2 measures, cut into parts: made once for a scan, so that every attempt measures the same together.

A loss depends in its last digits on which files went through the model at once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from services.core.store import Place
from services.scanner.loss import FileLoss, estimate
from services.scanner.snapshot import File

PHASE = "plan"
MOST_FILES = 512
"""Of a part, however small they are."""

_PLAN = pa.schema(
    [
        ("part", pa.int32()),
        ("text_sha256", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("tokens", pa.float64()),
    ]
)
_LOSSES = pa.schema(
    [("sha256", pa.string()), ("loss", pa.float64()), ("tokens", pa.int64()), ("sampled_tokens", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class Work:
    """One content to measure."""

    text_sha256: str
    """What the loss belongs to: of the text without its secrets where they were redacted, else of the content."""
    sha256: str
    size: int
    """In bytes."""
    place: Place
    tokens: float
    """Estimate of those that will be read."""

    @property
    def is_redacted(self) -> bool:
        """Whether it is measured without its secrets."""
        return self.text_sha256 != self.sha256


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of stage 2."""

    model: str
    model_digest: str
    """Of the weights: a worker with others must not measure."""
    parts: Sequence[Sequence[Work]]
    cached: int
    """Files whose loss was known."""

    @property
    def tokens(self) -> float:
        """Estimate of all."""
        return sum(work.tokens for part in self.parts for work in part)


def make(model: str, digest: str, wanted: Sequence[Work], *, part_tokens: int, cached: int) -> Plan:
    """Cuts the work into parts of about so many tokens, in the order of the packs, each of which is then read once."""
    ordered = sorted(wanted, key=lambda work: (work.place.pack, work.place.offset))
    return Plan(model, digest, list(_cut(ordered, part_tokens)), cached)


def _cut(ordered: Sequence[Work], part_tokens: int) -> Iterator[list[Work]]:
    part: list[Work] = []
    tokens = 0.0
    for work in ordered:
        if part and (tokens + work.tokens > part_tokens or len(part) == MOST_FILES):
            yield part
            part, tokens = [], 0.0
        part.append(work)
        tokens += work.tokens
    if part:
        yield part


def work_of(file: File, text_sha256: str, characters: int, max_tokens: int) -> Work:
    """The work that a file means."""
    return Work(text_sha256, file.sha256, file.size, file.place, estimate(characters, max_tokens))


def to_parquet(plan: Plan) -> bytes:
    """The plan as Parquet; the model stands in its metadata."""
    rows = [
        {
            "part": number,
            "text_sha256": work.text_sha256,
            "sha256": work.sha256,
            "size": work.size,
            "pack": work.place.pack,
            "offset": work.place.offset,
            "tokens": work.tokens,
        }
        for number, part in enumerate(plan.parts)
        for work in part
    ]
    told = {"model": plan.model, "model_digest": plan.model_digest, "cached": str(plan.cached)}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_PLAN.with_metadata(told)), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> Plan:
    """The plan that :func:`to_parquet` wrote."""
    table = pq.read_table(io.BytesIO(data))
    parts: list[list[Work]] = []
    for row in table.to_pylist():
        if row["part"] == len(parts):
            parts.append([])
        place = Place(row["pack"], row["offset"])
        parts[row["part"]].append(Work(row["text_sha256"], row["sha256"], row["size"], place, row["tokens"]))
    told = table.schema.metadata
    return Plan(told[b"model"].decode(), told[b"model_digest"].decode(), parts, int(told[b"cached"]))


def losses_to_parquet(losses: Sequence[tuple[str, FileLoss]]) -> bytes:
    """What was measured, by ``text_sha256``."""
    rows = [
        {"sha256": sha256, "loss": loss.loss, "tokens": loss.tokens, "sampled_tokens": loss.sampled_tokens}
        for sha256, loss in losses
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_LOSSES), buffer, compression="zstd")
    return buffer.getvalue()


def losses_from_parquet(data: bytes) -> dict[str, FileLoss]:
    """What :func:`losses_to_parquet` wrote."""
    return {
        row["sha256"]: FileLoss(row["loss"], row["tokens"], row["sampled_tokens"])
        for row in pq.read_table(io.BytesIO(data), schema=_LOSSES).to_pylist()
    }
