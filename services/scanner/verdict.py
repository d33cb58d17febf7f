"""What is decided about a file: reasons in order of precedence, and the verdict made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Reason(Enum):
    """Why a file was accepted or rejected.

    The names are those of the proto's VerdictReason without its prefix. The order is the precedence: of all that
    applies to a file, the first is its primary reason.
    """

    ACCEPTED = 1
    LINGUIST_ERROR = 2
    NOT_TEXT = 3
    NOT_CODE = 4
    TOO_LARGE = 5
    GENERATED = 6
    VENDORED = 7
    EXCLUDED_BY_MASK = 8
    LANGUAGE_OFF = 9
    LOTS_OF_DIGITS = 10
    LONG_LINES = 11
    ENCODED_DATA = 12
    DUPLICATE = 13
    SECRET = 14
    FILTER_EMPTY = 15
    HIGH_LOSS = 16
    LICENSE = 17


FORGIVABLE = frozenset(
    {
        Reason.EXCLUDED_BY_MASK,
        Reason.LANGUAGE_OFF,
        Reason.LOTS_OF_DIGITS,
        Reason.LONG_LINES,
        Reason.ENCODED_DATA,
        Reason.SECRET,
        Reason.HIGH_LOSS,
        Reason.LICENSE,
    }
)
"""What a force-include mask overrules. What linguist decides is final, and so are duplicates and files without text.
Secrets are redacted instead."""

Split = Literal["TRAIN", "TEST", "AUTO", ""]


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to reject a file."""

    reason: Reason
    detail: str = ""
    """What exactly: the mask, the share of digits, the survivor of a duplicate."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scan decided about one file; one row of verdicts.parquet."""

    path: str
    source: str
    sha256: str
    size: int
    language: str
    split: Split
    """TRAIN or TEST when accepted, else empty."""
    accepted: bool
    stage: int
    """The stage that decided: 1 (rules) or 2 (loss)."""
    reason: str
    reasons: tuple[str, ...]
    """Every reason that applies, the primary one first."""
    details: tuple[str, ...] = ()
    """What exactly, for each of the reasons."""
    encoding: str = ""
    """What the text was stored in; empty when it was not decoded."""
    license: str = ""
    """SPDX expression of its header; empty when it names none."""
    duplicate_of: str = ""
    """The survivor, as its source's name, a colon and its path."""
    similarity: float = 0.0
    """To the survivor: 1 for the same text, else the estimated Jaccard similarity."""
    loss: float | None = None
    """Nats per token; None when stage 2 did not read the file or the loss is no number."""
    bits_per_byte: float | None = None
    """The loss in bits per byte of UTF-8."""
    tokens: int = 0
    """Tokens of the file; 0 when stage 2 did not read it."""
    sampled_tokens: int = 0
    """Tokens that stage 2 read of it."""

    @property
    def detail(self) -> str:
        """Of the primary reason."""
        return self.details[0] if self.details else ""

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Verdict:
        """The verdict of a row of verdicts.parquet; what an older release did not write is left at its default."""
        known = {name: value for name, value in row.items() if name in cls.__dataclass_fields__}
        if "details" not in row:
            known["details"] = [row.get("detail", "")]
        return cls(**known | {"reasons": tuple(known["reasons"]), "details": tuple(known["details"])})


def by_precedence(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, the primary one first."""
    return tuple(sorted(findings, key=lambda finding: finding.reason.value))
