"""Datasets and verdicts as Parquet, which anyone can open.

The digest of a dataset is taken over what it was made from and its rows, without the losses: their last digits depend
on the processor, and on which files were measured together.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from codegraft.scanner.v1.dataset_pb2 import DatasetManifest, DatasetPart
from codegraft.scanner.v1.scan_pb2 import ScanSettings
from services.scanner.verdict import Split, Verdict

VERDICTS = "verdicts.parquet"
SHARD_BYTES = 128 << 20
"""Bytes of source files in a shard, about: what a reader takes into memory at once, and a download repeats."""
_ROWS = 512
"""Rows, and so texts, that are in memory at once."""

DATASET_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("language", pa.string()),
        ("split", pa.string()),
        ("text", pa.large_string()),
        ("tokens", pa.int64()),
        ("loss", pa.float64()),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("language", pa.string()),
        ("split", pa.string()),
        ("accepted", pa.bool_()),
        ("stage", pa.int32()),
        ("reason", pa.string()),
        ("reasons", pa.list_(pa.string())),
        ("details", pa.list_(pa.string())),
        ("encoding", pa.string()),
        ("license", pa.string()),
        ("duplicate_of", pa.string()),
        ("similarity", pa.float64()),
        ("loss", pa.float64()),
        ("bits_per_byte", pa.float64()),
        ("tokens", pa.int64()),
        ("sampled_tokens", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a dataset was made from."""

    project: str
    snapshot: str
    model: str
    """Id of the model of stage 2; empty when it was off."""
    model_digest: str
    """Digest of its weights; empty when it was off."""
    settings: ScanSettings = field(default_factory=ScanSettings)
    """With every default filled in."""


def manifest(origin: Origin, verdicts: Sequence[Verdict]) -> DatasetManifest:
    """The manifest of the dataset of the accepted files, without its ``files``."""
    digest = digest_of(origin, verdicts)
    return DatasetManifest(
        name=f"{origin.project}/datasets/{digest[:16]}",
        digest=digest,
        snapshot=origin.snapshot,
        model=origin.model,
        model_digest=origin.model_digest,
        train=_part(verdicts, "TRAIN"),
        test=_part(verdicts, "TEST"),
        languages=Counter(verdict.language for verdict in verdicts if verdict.accepted),
        reasons=Counter(verdict.reason for verdict in verdicts),
        settings=_as_struct(origin.settings),
    )


def digest_of(origin: Origin, verdicts: Sequence[Verdict]) -> str:
    """SHA-256 (hex) over origin and accepted rows; the order of the verdicts does not matter."""
    settings = json_format.MessageToJson(origin.settings, sort_keys=True, indent=None)
    digest = hashlib.sha256(json.dumps([origin.snapshot, origin.model, origin.model_digest, settings]).encode())
    for row in _accepted(verdicts):
        line = [row.source, row.path, row.sha256, row.size, row.language, row.split, row.tokens]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def write(verdicts: Sequence[Verdict], text_of: Callable[[str], str], folder: Path) -> dict[str, Path]:
    """Writes the accepted files into shards, train/part-00000.parquet and so on, by source and path.

    Args:
        text_of: the decoded text of a SHA-256.
        folder: where to.

    Returns:
        The shards by their path within the dataset.
    """
    written: dict[str, Path] = {}
    parts: list[tuple[str, Split]] = [("train", "TRAIN"), ("test", "TEST")]
    for part, split in parts:
        chosen = [verdict for verdict in _accepted(verdicts) if verdict.split == split]
        (folder / part).mkdir()
        for number, shard in enumerate(_shards(chosen)):
            name = f"{part}/part-{number:05}.parquet"
            written[name] = folder / name
            with pq.ParquetWriter(written[name], DATASET_SCHEMA, compression="zstd") as writer:
                for some in _chunks(shard):
                    rows = [_row(verdict, text_of(verdict.sha256)) for verdict in some]
                    writer.write_table(pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
    return written


def write_verdicts(verdicts: Sequence[Verdict], path: Path) -> None:
    """Writes verdicts.parquet, by source and path."""
    ordered = sorted(verdicts, key=lambda verdict: (verdict.source, verdict.path))
    with pq.ParquetWriter(path, VERDICT_SCHEMA, compression="zstd") as writer:
        for some in _chunks(ordered):
            columns = {name: [getattr(verdict, name) for verdict in some] for name in VERDICT_SCHEMA.names}
            writer.write_table(pa.Table.from_pydict(columns, schema=VERDICT_SCHEMA))


def _accepted(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return sorted((row for row in verdicts if row.accepted), key=lambda row: (row.source, row.path))


def _part(verdicts: Sequence[Verdict], split: Split) -> DatasetPart:
    rows = [row for row in verdicts if row.accepted and row.split == split]
    return DatasetPart(files=len(rows), bytes=sum(row.size for row in rows), tokens=sum(row.tokens for row in rows))


def _row(verdict: Verdict, text: str) -> dict[str, Any]:
    return {
        "path": verdict.path,
        "source": verdict.source,
        "sha256": verdict.sha256,
        "size": verdict.size,
        "language": verdict.language,
        "split": verdict.split,
        "text": text,
        "tokens": verdict.tokens,
        "loss": verdict.loss,
    }


def _shards(rows: Sequence[Verdict]) -> list[Sequence[Verdict]]:
    """The rows cut into shards of about the same size; one even without rows, for its schema."""
    sizes = list(itertools.accumulate((row.size for row in rows), initial=0))
    count = max(1, -(-sizes[-1] // SHARD_BYTES))
    cuts = [bisect.bisect_left(sizes, number * sizes[-1] / count) for number in range(count)] + [len(rows)]
    return [rows[begin:end] for begin, end in itertools.pairwise(cuts) if end > begin or count == 1]


def _as_struct(settings: ScanSettings) -> Struct:
    told = Struct()
    told.update(json_format.MessageToDict(settings, preserving_proto_field_name=True))
    return told


def _chunks(rows: Sequence[Verdict]) -> list[Sequence[Verdict]]:
    return [rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS)]
