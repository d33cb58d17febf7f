"""Secrets in the text of a file: API keys, passwords, private keys.

Kingfisher knows the formats that providers gave their keys. It runs in this process, and only its scanner is used,
which asks no provider whether a key is valid. What has no format of its own is found here: a value that looks random
and is assigned to something named like a password, a token or a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kingfisher_sdk import DetectionPolicy, Rules, Scanner

MAX_SECONDS = 10.0
"""For one text. The slowest of 42,000 real files took 0.1 s; 512 KiB made to be slow take 9 s."""
TOO_SLOW = "too-slow"
"""Rule of a text that took longer: all of it counts as secret, because nobody knows what is in it."""
MAX_MEAN_RUN = 3.0
"""Mean length of the runs of a random value, see :func:`_is_random`. Names of variables have 4 and more."""

_NAMESPACES = re.compile(r"^(?:betterleaks\.|veles\.secrets/)")
_CONFIDENCE = {"high": 3, "medium": 2, "low": 1}
_PLACEHOLDER = re.compile(rb"<redacted:[a-z0-9.-]+>")
_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that begin no character."""
_FAKE = re.compile(
    rb"(?i)example|placeholder|your[_-]|changeme|x{6}|\.\.\.|12345678|abcdefgh"
    rb"|eyJzdWIiOiIxMjM0NTY3ODkwIi"  # the token of jwt.io
)
_FAKE_PASSWORD = re.compile(
    rb"(?i)p[a@4][s$5]{2}|secret|token|test|sample|dummy|fake|mock|change|your|insert|replace|qwerty|letmein|default"
    rb"|admin|user|root|guest|demo|hunter|invalid|wrong|hello|0123|1234|abcd|foo|bar|[<>{}]|\$\(|^[$%@/]|[0-9]\.[0-9]+\.[0-9]"
    rb"|^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
)
"""What people write where a password would be; versions and UUIDs."""
_RUN = re.compile(rb"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\w./-]")
_HEXADECIMAL = re.compile(rb"(?i)(?=.*[0-9])(?=.*[a-f])[0-9a-f]{32,128}")
_ENCODED = re.compile(rb"[A-Za-z0-9+/=]{40}")
"""At least one line of a private key; what else stands between its marks speaks of keys and holds none."""
_WORD_ENDS = re.compile(rb"[:\s]")
_PASSWORDS = frozenset({"generic-credential-uri", "mongodb-connection-string", "curl-auth-user", "curl-auth-header"})
"""Rules of kingfisher that take every password, be it "password"."""

_NAMES = {b"pass": "password", b"pwd": "password", b"secret": "key", b"token": "key", b"key": "key"}
_SECRET_KEYS = (b"api", b"access", b"private", b"auth", b"account", b"encryption", b"signing", b"master", b"storage")
"""What stands before "key" where it is no key of a table or a cache."""
_MIN_VALUE = {"password": 8, "key": 20}
"""Characters; shorter ones cannot be told from words."""
# Searching for the names first is ten times as fast as an expression that begins with them.
_ASSIGNED = re.compile(
    rb"""([\w-]{0,40})["']?"""
    rb"""(?:[ \t]?:[ \t]?[A-Za-z][\w.\[\] |]{0,30}?)?"""  # a type
    rb"""[ \t]{0,40}(?:=>|:=|={1,3}|:|\()[ \t]{0,40}"""
    rb"""(?:[brf]?(["'`])([!#-&(-\[\]-_a-~]{8,128})\2|([\w!*+/:=?@^|~-]{8,128})[ \t]{0,40}\r?(?:\n|\Z))"""
)
_NO_PASSWORD = re.compile(rb"(?i:pass)(?!(?i:w|phrase))[a-z]")
_OF_A_HASH = re.compile(rb"(?i)hash|sha\d|md5|digest|checksum|fingerprint")
_UNNAMED = (
    (b"AC", "twilio-auth-token", re.compile(rb"""AC[0-9a-f]{32}["']?[\s,;:]{1,3}["']?([0-9a-f]{32})\b""")),
    (b":AA", "telegram-bot-token", re.compile(rb"([0-9]{8,10}:AA[\w-]{33})(?![\w-])")),
)


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret stands; never what it is."""

    rule: str
    """Name of the rule that found it, of lower case letters, digits, dots and dashes."""
    line: int
    """Of its first character; the first line is 1."""
    start: int
    """In characters of the text."""
    end: int
    """One past its last character."""


class _Span(NamedTuple):
    """A secret, in bytes of the text."""

    start: int
    end: int
    rule: str
    confidence: int


@cache
def finder(cache_dir: Path) -> Finder:
    """The one of this process.

    Args:
        cache_dir: of the service. The compiled rules are kept in a folder of it that only this user can read.
    """
    folder = cache_dir / "secrets"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return Finder(folder)


class Finder:
    """Finds secrets.

    Threads may share it, and run at once: kingfisher releases the interpreter's lock. Compiling its 488 rules takes
    3 seconds and 100 MB, so keep one a process.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """
        Args:
            cache: folder for the compiled rules, with which the next process starts in 0.3 seconds. It must belong to
                the user alone: what is read from it is trusted.
        """
        # The policy bounds what is read again for each match. Its marks to ignore a line are for people who own the
        # code and the scan; here they would let a file speak for itself. Base64 would double the time.
        policy = DetectionPolicy(inline_ignores=False, markup_context=False, base64_max_depth=0)
        rules = Rules(cache=cache is not None, cache_dir=cache)
        self._scanner = Scanner(rules, base64=False, policy=policy)

    def find(self, text: str) -> list[Secret]:
        """The secrets of a text, in order and without overlaps; every copy of a secret is one too."""
        # Kingfisher takes text with many NULs for UTF-16, and would count other bytes than ours.
        data = text.replace("\0", "\1").encode()
        # What was redacted is no secret, whatever a rule may say of the placeholder.
        if b"<redacted:" in data:
            data = _PLACEHOLDER.sub(lambda mark: b"<" * len(mark[0]), data)
        try:
            found = [*self._known(data), *_assigned(data), *_unnamed(data)]
        except TimeoutError:
            return [Secret(TOO_SLOW, line=1, start=0, end=len(text))]
        return list(_located(data, _merged(_copied(data, _merged(found)))))

    def redacted(self, text: str) -> str:
        """The text with a placeholder for each secret. Nothing more is found in it."""
        # A placeholder can bring together what was too far apart to be found: four rounds were the most ever seen.
        while secrets := self.find(text):
            text = redact(text, secrets)
        return text

    def _known(self, data: bytes) -> Iterator[_Span]:
        for finding in self._scanner.scan(data, timeout=MAX_SECONDS):
            if not finding.visible:
                continue  # helps to recognise another, like the name of an account
            location = finding.location
            span = _Span(
                location["start_offset"],
                location["end_offset"],
                _NAMESPACES.sub("", finding.rule_id),
                _CONFIDENCE[finding.confidence],
            )
            if _is_meant(span.rule, data[span.start : span.end]):
                yield span


def redact(text: str, secrets: Sequence[Secret]) -> str:
    """The text with a placeholder instead of these secrets, which :meth:`Finder.find` found in it."""
    parts: list[str] = []
    done = 0
    for secret in secrets:
        parts += (text[done : secret.start], f"<redacted:{secret.rule}>")
        done = secret.end
    return "".join((*parts, text[done:]))


def _assigned(data: bytes) -> Iterator[_Span]:
    """Random values with the name of a password or a key."""
    lowered = data.lower()
    for name, rule in _NAMES.items():
        at = lowered.find(name)
        while at >= 0:
            match = _ASSIGNED.match(data, at)
            if match and _is_named(name, data[max(0, at - 12) : at], match[1]):
                value, group = (match[3], 3) if match[3] else (match[4], 4)
                if len(value) >= _MIN_VALUE[rule] and _is_random(value):
                    yield _Span(*match.span(group), f"assigned-{rule}", 0)
            at = lowered.find(name, at + len(name))


def _is_named(name: bytes, before: bytes, rest: bytes) -> bool:
    """Whether a variable is named like a secret. The rest of its name begins with what was searched for."""
    if name == b"key":
        return before.lower().rstrip(b"_-").endswith(_SECRET_KEYS)
    if name == b"pass" and (_NO_PASSWORD.match(rest) or (before[-1:].islower() and rest[:1].islower())):
        return False  # passport, minipass
    return _OF_A_HASH.search(rest) is None


def _unnamed(data: bytes) -> Iterator[_Span]:
    """Formats that kingfisher knows only next to the name of their provider, or not at all."""
    for mark, rule, pattern in _UNNAMED:
        if mark in data:  # ten times as fast as the expression
            for match in pattern.finditer(data):
                if not _FAKE.search(match[1]):
                    yield _Span(*match.span(1), rule, 2)


def _is_meant(rule: str, value: bytes) -> bool:
    """Whether a finding of kingfisher is more than an example of its format."""
    if rule == "private-key":
        return _ENCODED.search(value) is not None
    if rule in _PASSWORDS:
        return _is_random(_WORD_ENDS.split(value.split(b"@")[0])[-1])
    return _FAKE.search(value) is None


def _is_random(value: bytes) -> bool:
    """Whether this looks like chosen by a machine.

    Names are made of long runs of letters: the mean run of ``camelCaseName`` has 4 characters. Of random letters and
    digits it has 1.8. Each other character counts as a run of its own, but for those that divide words.
    """
    if len(set(value)) < 6 or _FAKE.search(value) or _FAKE_PASSWORD.search(value):
        return False
    return len(value) <= MAX_MEAN_RUN * len(_RUN.findall(value)) or _HEXADECIMAL.fullmatch(value) is not None


def _copied(data: bytes, spans: Iterable[_Span]) -> Iterator[_Span]:
    """The spans and all other places where the same values stand."""
    for value, span in {data[span.start : span.end]: span for span in spans}.items():
        at = data.find(value)
        while at >= 0:
            yield span._replace(start=at, end=at + len(value))
            at = data.find(value, at + len(value))


def _merged(spans: Iterable[_Span]) -> list[_Span]:
    """In order, with one span for all that overlap, named by the longest of them."""
    merged: list[_Span] = []
    longest = (0, 0)
    for span in sorted(spans):
        size = (span.end - span.start, span.confidence)
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            rule = span.rule if size > longest else last.rule
            merged[-1] = last._replace(end=max(last.end, span.end), rule=rule)
            longest = max(longest, size)
        else:
            merged.append(span)
            longest = size
    return merged


def _located(data: bytes, spans: Iterable[_Span]) -> Iterator[Secret]:
    """The spans in characters and lines."""
    at, characters, lines = 0, 0, 1
    for span in spans:
        before = data[at : span.start]
        start = characters + len(before.translate(None, _CONTINUATION))
        end = start + len(data[span.start : span.end].translate(None, _CONTINUATION))
        lines += before.count(b"\n")
        yield Secret(span.rule, lines, start, end)
        at, characters, lines = span.end, end, lines + data[span.start : span.end].count(b"\n")
