"""The licence that a file names in its header: an SPDX tag, or the wording that a licence asks to be put there."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import lru_cache

from license_expression import ExpressionError, LicenseWithExceptionSymbol, Licensing, get_spdx_licensing

HEAD = 6000
"""Characters in which a header is looked for."""

_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9 .+()/:_-]{2,200})")
_COMMENT_MARKS = str.maketrans(dict.fromkeys("*#/;%\"'!-", " "))
"""What wraps a header into comments."""
_GNU = re.compile(
    r"GNU (?P<kind>Lesser |Library |Affero )?General Public License(?: as published by the Free Software Foundation)?"
    r".{0,60}?(?:version|v\.?) ?(?P<version>[123](?:\.\d)?)"
)
_GNU_IDS = {None: "GPL", "Lesser ": "LGPL", "Library ": "LGPL", "Affero ": "AGPL"}
# With what the text must have in lower case: to look for that is ten times as fast as the expression.
_WORDINGS = (
    ("Apache-2.0", "licen", r"licensed under the apache license, version 2\.0|apache\.org licenses license 2\.0"),
    ("MPL-2.0", "mozilla public", r"mozilla public license, (?:v\.|version) 2\.0"),
    ("EPL-2.0", "eclipse public", r"eclipse public license (?:v|version )?\.? ?2\.0"),
    ("EPL-1.0", "eclipse public", r"eclipse public license (?:v|version )?\.? ?1\.0"),
    ("BSL-1.0", "boost software", r"boost software license,? version 1\.0"),
    ("CDDL-1.0", "common dev", r"common development and distribution license"),
    ("Unlicense", "unencumbered", r"this is free and unencumbered software released into the public domain"),
    ("CC0-1.0", "cc", r"cc0 1\.0"),
    ("CC0-1.0", "creative commons", r"creative commons zero"),
    ("ISC", "permission to", r"permission to use, copy, modify, and(?: or)? distribute this software for any purpose"),
    ("MIT", "permission is", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("MIT", "mit license", r"\bmit license"),
    ("BSD", "redistribution", r"redistribution and use in source and binary forms"),
    ("BSD", "bsd", r"bsd [23] clause"),
)
_PATTERNS = [(name, mark, re.compile(wording)) for name, mark, wording in _WORDINGS]
_THIRD_CLAUSE = re.compile(r"bsd 3 clause|neither the names? of|may not be used to endorse")


def detect(text: str) -> str:
    """The licence that the header names, as an SPDX expression; empty when it names none.

    A tag counts more than words. What a tag says that is no expression is given back as it stands.
    """
    head = text[:HEAD]
    if tag := _TAG.search(head):
        return _normal(tag[1].rstrip(" */-"))  # the end of a comment is no part of it
    if not any(word in head for word in ("icense", "ICENSE", "ermission", "edistribution", "public domain")):
        return ""
    plain = " ".join(head.translate(_COMMENT_MARKS).split())
    if gnu := _GNU.search(plain):
        version = gnu["version"] if "." in gnu["version"] else gnu["version"] + ".0"
        later = re.search(r"any later version|or later", plain[gnu.end() : gnu.end() + 200])
        return f"{_GNU_IDS[gnu['kind']]}-{version}-{'or-later' if later else 'only'}"
    lowered = plain.lower()
    for name, mark, pattern in _PATTERNS:
        if mark in lowered and (found := pattern.search(lowered)):
            if name != "BSD":
                return name
            return "BSD-3-Clause" if _THIRD_CLAUSE.search(lowered, found.start()) else "BSD-2-Clause"
    return ""


@lru_cache(maxsize=4096)
def excluded(expression: str, patterns: Collection[str]) -> str:
    """The licence for which a file is left out; empty when it may stay.

    Of "A OR B" one may choose: only when both are excluded the file is.

    Args:
        patterns: hashable; SPDX ids, where a ``*`` stands for anything, without regard to case.
    """
    if not expression or not patterns:
        return ""
    try:
        return _excluded(_licensing().parse(expression), patterns)
    except ExpressionError:
        return _match(expression, patterns)


def _excluded(node: object, patterns: Collection[str]) -> str:
    licensing = _licensing()
    if isinstance(node, licensing.OR):
        found = [_excluded(one, patterns) for one in node.args]
        return found[0] if all(found) else ""
    if isinstance(node, licensing.AND):
        return next(filter(None, (_excluded(one, patterns) for one in node.args)), "")
    if isinstance(node, LicenseWithExceptionSymbol):
        return _match(str(node), patterns) or _match(node.license_symbol.key, patterns)
    return _match(str(node), patterns)


def _match(name: str, patterns: Collection[str]) -> str:
    return name if any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns) else ""


@lru_cache(maxsize=1024)
def _normal(told: str) -> str:
    try:
        return str(_licensing().parse(told))
    except ExpressionError:
        return told


@lru_cache(maxsize=1)
def _licensing() -> Licensing:
    return get_spdx_licensing()
