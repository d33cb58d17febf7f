"""Values as people read them: filters of the templates."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.access.v1.access_pb2 import Role
from codegraft.common.v1.job_pb2 import JobState, Progress
from codegraft.common.v1.split_pb2 import Split
from codegraft.inference.v1.serving_pb2 import ServingMode
from codegraft.ingest.v1.source_pb2 import SourceState
from codegraft.scanner.v1.verdict_pb2 import VerdictReason
from services.client.jobs import FINAL
from services.client.words import duration, state_word
from services.gateway.console.meanings import meaning


def id_of(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def pair(text: str) -> tuple[str, str]:
    """An option that is called as it is sent."""
    return text, text


def part_of(name: str, kind: str) -> str:
    """One id of a resource name: of ``runs`` the run's; empty when it has none."""
    parts = name.split("/")
    return dict(zip(parts[::2], parts[1::2], strict=False)).get(kind, "")


def version(checkpoint: str) -> str:
    """``RUN/STEP`` of a checkpoint's name, as one writes it; empty for the base model."""
    return checkpoint.partition("/runs/")[2].replace("checkpoints/", "")


def count(number: float) -> str:
    """1234567 as 1,234,567; fractions stay out."""
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes with a unit that leaves few digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def loss(value: float | None) -> str:
    """Nats per token."""
    return "-" if value is None else f"{value:.4f}"


def share(part: float, whole: float) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def moment(time: Timestamp) -> str:
    """In UTC, to the second; a dash for none."""
    if not time.seconds:
        return "-"
    return datetime.fromtimestamp(time.seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def iso(time: Timestamp) -> str:
    """For machines."""
    return datetime.fromtimestamp(time.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_over(state: JobState) -> bool:
    """Whether a job has ended."""
    return state in FINAL


def role(value: Role) -> str:
    """``operator`` and the like."""
    return Role.Name(value).removeprefix("ROLE_").lower()


def source_state(state: SourceState) -> str:
    """``ready`` and the like."""
    return SourceState.Name(state).removeprefix("SOURCE_STATE_").lower()


def split(value: Split) -> str:
    """``train``, ``test`` or ``auto``."""
    return Split.Name(value).removeprefix("SPLIT_").lower()


def mode(value: ServingMode) -> str:
    """``latest best`` and the like."""
    return ServingMode.Name(value).removeprefix("SERVING_MODE_").replace("_", " ").lower()


def reason(value: VerdictReason) -> str:
    """``HIGH_LOSS`` and the like."""
    return VerdictReason.Name(value).removeprefix("VERDICT_REASON_")


def progress(value: Progress) -> str:
    """How far, how fast and how long yet, as far as it can be said."""
    total = f" of {value.total:,.0f}" if value.total else ""
    parts = [f"{value.done:,.0f}{total} {value.unit}"] if value.unit else []
    if value.rate:
        parts.append(f"{value.rate:,.1f} {value.unit}/s")
    if value.HasField("eta_seconds"):
        parts.append(f"{duration(value.eta_seconds)} left")
    return ", ".join(parts)


FILTERS = {
    each.__name__: each
    for each in (
        *(id_of, pair, part_of, version, count, size, loss, duration, moment, iso, state_word, is_over),
        *(role, source_state, split, mode, reason, meaning, progress),
    )
}
