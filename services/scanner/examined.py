"""What stage 1 found out about files, as Parquet: the result of one part of a scan."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from services.core.store import Place
from services.scanner import near, near_groups
from services.scanner.languages import Traits
from services.scanner.pipeline import Entry
from services.scanner.snapshot import File
from services.scanner.verdict import Finding, Reason

_SCHEMA = pa.schema(
    [
        near_groups.KEY,
        ("source", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("split", pa.string()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("language", pa.string()),
        ("generated", pa.bool_()),
        ("vendored", pa.bool_()),
        ("encoding", pa.string()),
        ("license", pa.string()),
        ("fingerprint", pa.string()),
        ("characters", pa.int64()),
        ("utf8_bytes", pa.int64()),
        ("forced", pa.bool_()),
        ("text_sha256", pa.string()),
        ("redacted", pa.string()),
        ("reasons", pa.list_(pa.string())),
        ("details", pa.list_(pa.string())),
        near_groups.SIGNATURE,
    ]
)


def signatures(entries: Sequence[Entry], texts: Sequence[str]) -> list[bytes | None]:
    """What near-duplicates are found by: of each text that nothing speaks against; None for the others."""
    clean = [number for number, entry in enumerate(entries) if entry.is_clean]
    column = near_groups.signature_column(near.signatures([texts[number] for number in clean]))
    by_number = dict(zip(clean, column.to_pylist(), strict=True))
    return [by_number.get(number) for number in range(len(entries))]


def to_parquet(entries: Sequence[Entry], signatures: Sequence[bytes | None], *, first: int) -> bytes:
    """The entries; the same ones give the same bytes.

    Args:
        signatures: of each entry.
        first: the key of the first entry; the others' follow.
    """
    rows = [
        {
            "key": first + number,
            "source": entry.file.source,
            "path": entry.file.path,
            "sha256": entry.file.sha256,
            "size": entry.file.size,
            "split": entry.file.split,
            "pack": entry.file.place.pack,
            "offset": entry.file.place.offset,
            "language": entry.traits.language,
            "generated": entry.traits.generated,
            "vendored": entry.traits.vendored,
            "encoding": entry.encoding,
            "license": entry.license,
            "fingerprint": entry.fingerprint,
            "characters": entry.characters,
            "utf8_bytes": entry.utf8_bytes,
            "forced": entry.forced,
            "text_sha256": entry.text_sha256,
            "redacted": entry.redacted,
            "reasons": [finding.reason.name for finding in entry.findings],
            "details": [finding.detail for finding in entry.findings],
            "signature": signatures[number],
        }
        for number, entry in enumerate(entries)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(path: Path) -> list[Entry]:
    """The entries that :func:`to_parquet` wrote, in their order."""
    return [
        Entry(
            file=File(
                source=row["source"],
                path=row["path"],
                size=row["size"],
                sha256=row["sha256"],
                split=row["split"],
                place=Place(row["pack"], row["offset"]),
            ),
            traits=Traits(row["language"], row["generated"], row["vendored"]),
            encoding=row["encoding"],
            license=row["license"],
            fingerprint=row["fingerprint"],
            characters=row["characters"],
            utf8_bytes=row["utf8_bytes"],
            forced=row["forced"],
            findings=tuple(
                Finding(Reason[reason], detail) for reason, detail in zip(row["reasons"], row["details"], strict=True)
            ),
            text_sha256=row["text_sha256"],
            redacted=row["redacted"],
        )
        for row in pq.read_table(path, columns=_SCHEMA.names[1:-1]).to_pylist()
    ]
