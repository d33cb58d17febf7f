"""What linguist says of a file: language, generated, vendored, binary.

go-enry follows github-linguist's data and rules. Its Go runtime hangs in a forked process: whoever adds processes here
must spawn them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import enry

ALSO_CODE = frozenset({"SQL", "Vue", "Svelte", "Astro"})
"""Languages that linguist files under data or markup, and that people write, and complete, as programs."""

_TEXT_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_HEAD = 8000
"""Bytes in which git and linguist look for a NUL."""
_CONSIDERED = 50 * 1024
"""Bytes in which linguist looks for what tells languages with the same extension apart."""

# Linguist's heuristics for .h, where go-enry needs 20 times as long. All of them begin with a character that makes the
# search fast.
_OBJECTIVE_C = re.compile(
    rb"\n\s*(?:@(?:interface|class|protocol|property|end|synchronised|selector|implementation)\b|#import\s+.+\.h[\">])"
)
_CPP = re.compile(
    rb"\n(?:\s*#\s*include <(?:cstdint|string|vector|map|list|array|bitset|queue|stack|forward_list|unordered_map"
    rb"|unordered_set|(?:i|o|io)stream)>|\s*template\s*<|[ \t]*(?:try|constexpr|catch\s*\("
    rb"|(?:class|(?:using[ \t]+)?namespace)\s+\w|(?:private|public|protected):\n))"
)
_CPP_ANYWHERE = re.compile(rb"__has_cpp_attribute|__cplusplus >|std::\w")


@dataclass(frozen=True, slots=True)
class Traits:
    """What linguist says of one file."""

    language: str
    """Linguist's name; empty when unknown."""
    generated: bool
    vendored: bool
    documentation: bool = False


UNKNOWN = Traits("", generated=False, vendored=False)


def identify(path: str, content: bytes) -> Traits:
    """Language and kind of a text file.

    Args:
        path: path within the source; need not be valid Unicode.
        content: the whole file, in UTF-8 or an 8-bit encoding.
    """
    name = _safe(path)
    return Traits(
        language=_language(name, content[:_CONSIDERED]),
        generated=bool(enry.is_generated(name, content)),
        vendored=bool(enry.is_vendor(name)),
        documentation=bool(enry.is_documentation(name)),
    )


def _language(name: str, content: bytes) -> str:
    if name.endswith(".h") and not content.startswith(b"#!"):
        return _by_modeline(content) or _of_header(content)
    if name.endswith(".json") and b'"swagger"' not in content and b'"openapi"' not in content:
        named = enry.get_language_by_filename(name).language
        return str(named or _by_modeline(content) or "JSON")
    return str(enry.get_language(name, content))


def _by_modeline(content: bytes) -> str:
    if not any(mark in content for mark in (b"-*-", b"vim", b"vi:", b"ex:")):
        return ""
    return str(enry.get_language_by_modeline(content).language)


def _of_header(content: bytes) -> str:
    lines = b"\n" + content + b"\n"
    if (b"@" in lines or b"#import" in lines) and _OBJECTIVE_C.search(lines):
        return "Objective-C"
    return "C++" if _CPP.search(lines) or _CPP_ANYWHERE.search(lines) else "C"


def from_path(path: str) -> Traits:
    """What can be said without the content."""
    name = _safe(path)
    language = enry.get_language_by_filename(name).language or enry.get_language_by_extension(name).language
    return Traits(
        language=language,
        generated=False,
        vendored=bool(enry.is_vendor(name)),
        documentation=bool(enry.is_documentation(name)),
    )


def is_binary(content: bytes) -> bool:
    """Linguist's rule: UTF-16 and UTF-32 with a byte order mark are text; else a NUL near the begin means binary."""
    return not content.startswith(_TEXT_BOMS) and b"\0" in content[:_HEAD]


@lru_cache(maxsize=2048)
def is_code(language: str) -> bool:
    """Whether linguist's language is one to learn from."""
    return language in ALSO_CODE or str(enry.get_language_type(language)) == "programming"


@lru_cache(maxsize=2048)
def by_name(name: str) -> str:
    """Linguist's spelling of a language that .gitattributes name ("java", "Common-Lisp"); empty when there is none."""
    spaced = name.replace("-", " ")
    return next((known for known in (name, spaced, spaced.title(), name.upper()) if is_known(known)), "")


def is_known(language: str) -> bool:
    """Whether linguist has a language of that name."""
    return str(enry.get_language_type(language)) != "unknown"


def _safe(path: str) -> str:
    """A NUL would cut the path off in C, and a lone surrogate cannot be encoded."""
    return path.replace("\0", "_").encode(errors="replace").decode()
