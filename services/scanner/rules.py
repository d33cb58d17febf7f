"""The rules of a scan: its settings with every default filled in, and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest
from codegraft.scanner.v1.scan_pb2 import SECRET_POLICY_REJECT, Scan, ScanSettings
from services.core.errors import InvalidArgument
from services.core.masks import Masks
from services.core.models import catalogue
from services.scanner import languages as linguist
from services.scanner.split import MAX_SHARE


@dataclass(frozen=True, slots=True)
class Rules:
    """How a scan filters. The fields are those of the proto's ScanSettings."""

    max_file_bytes: int = 512 * 1024
    """Larger files are rejected; exactly this size is accepted."""
    max_digit_share: float = 0.30
    """Of the non-whitespace characters; exactly this share is accepted."""
    exclude: tuple[str, ...] = ()
    """Masks of the scan itself."""
    force_include: tuple[str, ...] = ()
    """Masks of files that are taken in spite of what is forgivable."""
    languages: frozenset[str] = frozenset()
    """Linguist names; empty means every programming language."""
    loss_filter: bool = True
    """Whether stage 2 runs."""
    max_loss: float = 3.0
    """Nats per token."""
    min_tokens: int = 32
    """Shorter files are rejected by stage 2."""
    max_tokens_per_file: int = 4096
    """Stage 2 reads at most this many tokens of a file."""
    window_tokens: int = 512
    """Longest sequence that stage 2 gives to the model."""
    model: str = catalogue.DEFAULT_MODEL
    """Base model whose loss is measured."""
    seed: int = 0
    """Of the automatic split."""
    test_share: float | None = None
    """Of the AUTO files that become test; None: see split.py."""
    reject_vendored: bool = True
    reject_generated: bool = True
    near_duplicates: bool = True
    """Whether near-duplicates are rejected."""
    near_threshold: float = 0.7
    """Least Jaccard similarity of near-duplicates."""
    secrets: int = SECRET_POLICY_REJECT
    """What happens to files with secrets: a SecretPolicy."""
    exclude_licenses: tuple[str, ...] = ()
    """SPDX ids, with ``*`` for anything."""
    loss_mad: float | None = None
    """Median absolute deviations over its language's median that a loss may be; None: max_loss for all."""
    languages_off: frozenset[str] = frozenset()
    """Linguist names of languages to leave out."""


_RANGES: dict[str, tuple[float, float]] = {
    "max_file_bytes": (1, 16 * 1024 * 1024),
    "max_digit_share": (0, 1),
    "max_loss": (0, 1000),
    "min_tokens": (1, 4096),
    "max_tokens_per_file": (64, 1_000_000),
    "window_tokens": (32, 8192),
    "test_share": (0, MAX_SHARE),
    "near_threshold": (0.5, 1),
    "loss_mad": (0, 1000),
}


def resolve(settings: ScanSettings, *, default_model: str = catalogue.DEFAULT_MODEL) -> Rules:
    """The rules that settings stand for.

    Raises:
        InvalidArgument: a number out of its range, or a language that linguist does not know; names the field.
        InvalidMask: a mask that is no pattern.
        ModelNotFound: no such model.
    """
    given: dict[str, Any] = {}
    for field in fields(Rules):
        descriptor = ScanSettings.DESCRIPTOR.fields_by_name[field.name]
        if descriptor.has_presence and settings.HasField(field.name):
            given[field.name] = getattr(settings, field.name)
    for name, (low, high) in _RANGES.items():
        if (value := given.get(name)) is not None and not (math.isfinite(value) and low <= value <= high):
            raise InvalidArgument(
                f"{name} is {value:g}",
                field=f"settings.{name}",
                hint=f"Give a number from {low:g} to {high:g}.",
            )
    for field_name in ("languages", "languages_off"):
        check_languages(getattr(settings, field_name), f"settings.{field_name}")
    Masks(settings.exclude, field="settings.exclude")
    Masks(settings.force_include, field="settings.force_include")
    return Rules(
        **given,
        exclude=tuple(settings.exclude),
        force_include=tuple(settings.force_include),
        languages=frozenset(settings.languages),
        languages_off=frozenset(settings.languages_off),
        exclude_licenses=tuple(settings.exclude_licenses),
        secrets=settings.secrets or SECRET_POLICY_REJECT,
        model=catalogue.find(settings.model or default_model).id,
    )


def of_scan(scan: Scan, manifest: SnapshotManifest, *, default_model: str) -> tuple[Rules, list[str]]:
    """The rules of a scan, with what its project leaves out; and which languages of that linguist does not know."""
    settled = resolve(scan.settings, default_model=default_model)
    return of_project(settled, manifest.languages_off, manifest.exclude_licenses)


def of_project(rules: Rules, languages_off: Iterable[str], exclude_licenses: Iterable[str]) -> tuple[Rules, list[str]]:
    """The rules together with what the project leaves out, and which of its languages linguist does not know."""
    given = sorted(set(languages_off))
    settled = replace(
        rules,
        languages_off=rules.languages_off | set(given),
        exclude_licenses=(*rules.exclude_licenses, *exclude_licenses),
    )
    return settled, [language for language in given if not linguist.is_known(language)]


def check_languages(given: Iterable[str], field: str) -> None:
    """Raises InvalidArgument for a language that linguist does not know."""
    for language in given:
        if not linguist.is_known(language):
            raise InvalidArgument(
                f"{language[:80]!r} is no language that linguist knows",
                field=field,
                hint="Use linguist's spelling, for example Python, C++ or Shell.",
            )


def to_settings(rules: Rules) -> ScanSettings:
    """The settings that stand for these rules, with nothing left to a default."""
    settings = ScanSettings()
    for field in fields(Rules):
        value = getattr(rules, field.name)
        if isinstance(value, tuple | frozenset):
            getattr(settings, field.name).extend(sorted(value) if isinstance(value, frozenset) else value)
        elif value is not None:
            setattr(settings, field.name, value)
    return settings
