"""Stage 1: a file's way to its verdict, by rules alone.

:func:`examine` is a pure function of path, bytes and rules. It gathers everything that speaks against a file; the first
finding by precedence is the primary reason. Duplicates need all files at once and follow in duplicates.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from codegraft.scanner.v1.scan_pb2 import SECRET_POLICY_REDACT
from services.core.masks import Masks
from services.scanner import languages, licenses, text
from services.scanner.attributes import NONE, Attributes
from services.scanner.languages import Traits
from services.scanner.rules import Rules
from services.scanner.secrets import Finder, Secret
from services.scanner.verdict import FORGIVABLE, Finding, Reason, by_precedence

TOLD_SECRETS = 5
"""The others of a file are only counted."""


@dataclass(frozen=True, slots=True)
class SourceMasks:
    """The masks that apply to the files of one source."""

    exclude: Masks
    """Of the scan, the project and the source together."""
    include: Masks
    """Of the source; empty means every file."""
    force: Masks
    """Of the scan: see :data:`~services.scanner.verdict.FORGIVABLE`."""
    attributes: Attributes = NONE
    """Of the source, where they are honoured."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What stage 1 found out about one file."""

    findings: tuple[Finding, ...]
    """Why it cannot be accepted, the primary reason first; empty when nothing speaks against it."""
    traits: Traits = languages.UNKNOWN
    text: str = ""
    """The decoded file, without the secrets that were redacted; empty when it could not be decoded or was not read."""
    encoding: str = ""
    """What the text was stored in."""
    license: str = ""
    """See licenses.py."""
    fingerprint: str = ""
    """Equal for files that differ in line ends and trailing blanks only; empty without text."""
    redacted: str = ""
    """What stands in the text for secrets, by rule and line; empty when nothing does."""
    forced: bool = False
    """Whether a force-include mask matches."""


def examine(
    path: str, data: bytes | None, rules: Rules, masks: SourceMasks, finder: Finder | None = None, *, size: int
) -> Examined:
    """Examines one file.

    Args:
        path: path within its source.
        data: its content; None when it could not be read, or was not, as it is over the size limit.
        rules: the scan's settings.
        masks: the masks of its source.
        finder: of secrets; None looks for none.
        size: its size in bytes.
    """
    forced = masks.force.match(path) is not None
    is_large = size > rules.max_file_bytes
    if data is None and not is_large:
        return Examined((Finding(Reason.LINGUIST_ERROR, "the content could not be read"),))
    is_binary = data is not None and languages.is_binary(data)
    try:
        decoded = None if is_binary or data is None else text.decode(data)
    except text.Undecodable as error:
        return Examined((Finding(Reason.LINGUIST_ERROR, str(error)),))
    traits = masks.attributes.apply(path, _traits(path, data, decoded))
    if is_large or decoded is None:
        unfit = Finding(Reason.TOO_LARGE, f"{size} bytes") if is_large else Finding(Reason.NOT_TEXT, "binary")
        found = [unfit, *_by_path(path, traits, rules, masks)]
        return Examined(_unforgiven(found, forced), traits, forced=forced)
    license = licenses.detect(decoded.text)
    found = [*_by_path(path, traits, rules, masks), *_by_content(decoded.text, traits, license, rules)]
    content, redacted = decoded.text, ""
    if finder and (secrets := finder.find(content)):
        if forced or rules.secrets == SECRET_POLICY_REDACT:
            content, redacted = finder.redacted(content), _told(secrets)
        else:
            found.append(Finding(Reason.SECRET, _told(secrets)))
    return Examined(
        findings=_unforgiven(found, forced),
        traits=traits,
        text=content,
        encoding=decoded.encoding,
        license=license,
        fingerprint=text.fingerprint(content),
        redacted=redacted,
        forced=forced,
    )


def _traits(path: str, data: bytes | None, decoded: text.Text | None) -> Traits:
    if data is None:
        return languages.from_path(path)
    if decoded is None:
        return replace(languages.identify(path, data), language="")
    # Linguist's heuristics read bytes: UTF-16 would hide every keyword from them.
    return languages.identify(path, decoded.text.encode() if decoded.encoding in text.WIDE else data)


def _by_path(path: str, traits: Traits, rules: Rules, masks: SourceMasks) -> Iterator[Finding]:
    if traits.vendored and rules.reject_vendored:
        yield Finding(Reason.VENDORED)
    if mask := masks.exclude.match(path):
        yield Finding(Reason.EXCLUDED_BY_MASK, mask)
    elif masks.include and masks.include.match(path) is None:
        yield Finding(Reason.EXCLUDED_BY_MASK, "matched by no include mask")


def _by_content(content: str, traits: Traits, license: str, rules: Rules) -> Iterator[Finding]:
    language = traits.language
    if language in rules.languages_off:
        yield Finding(Reason.LANGUAGE_OFF, language)
    elif language not in rules.languages and content:
        is_code = languages.is_code(language) if traits.detectable is None else traits.detectable and bool(language)
        if not is_code:
            yield Finding(Reason.NOT_CODE, language or "of no known language")
        elif rules.languages:
            yield Finding(Reason.LANGUAGE_OFF, language)
    if traits.generated and rules.reject_generated:
        yield Finding(Reason.GENERATED)
    if (share := text.digit_share(content)) > rules.max_digit_share:
        yield Finding(Reason.LOTS_OF_DIGITS, f"{share:.1%} of the characters")
    if problem := text.long_lines(content):
        yield Finding(Reason.LONG_LINES, problem)
    if problem := text.encoded_data(content):
        yield Finding(Reason.ENCODED_DATA, problem)
    if not content.strip():
        yield Finding(Reason.FILTER_EMPTY, "no text")
    if left_out := licenses.excluded(license, rules.exclude_licenses):
        yield Finding(Reason.LICENSE, left_out)


def _told(secrets: Sequence[Secret]) -> str:
    """Rules and lines, never the secrets."""
    told = [f"{secret.rule} in line {secret.line}" for secret in secrets[:TOLD_SECRETS]]
    rest = len(secrets) - len(told)
    return ", ".join(told) + (f" and {rest} more" if rest else "")


def _unforgiven(findings: list[Finding], forced: bool) -> tuple[Finding, ...]:
    return by_precedence(finding for finding in findings if not (forced and finding.reason in FORGIVABLE))
