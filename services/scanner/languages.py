"""What linguist says of a file: language, generated, vendored, binary.

go-enry follows github-linguist's data and rules. Its Go runtime hangs in a forked process: whoever adds processes here
must spawn them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache

import enry

from services.scanner import amendments, generated

ALSO_CODE = frozenset({"SQL", "Vue", "Svelte", "Astro"})
"""Languages that linguist files under data or markup, and that people write, and complete, as programs."""

_TEXT_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_BINARY = (b"%PDF-", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\xff\xd8\xff")
_LOOKED_AT = 1 << 20
"""Bytes in which linguist looks for a NUL."""
_CONSIDERED = 50 * 1024
"""Bytes in which linguist looks for what tells languages with the same extension apart."""

_ONLY = {
    ".adoc": "AsciiDoc",
    ".bat": "Batchfile",
    ".c": "C",
    ".cc": "C++",
    ".cpp": "C++",
    ".css": "CSS",
    ".dart": "Dart",
    ".go": "Go",
    ".gradle": "Gradle",
    ".java": "Java",
    ".js": "JavaScript",
    ".jsx": "JavaScript",
    ".kt": "Kotlin",
    ".lua": "Lua",
    ".proto": "Protocol Buffer",
    ".py": "Python",
    ".rb": "Ruby",
    ".rst": "reStructuredText",
    ".scala": "Scala",
    ".scss": "SCSS",
    ".sh": "Shell",
    ".svg": "SVG",
    ".swift": "Swift",
    ".toml": "TOML",
    ".vue": "Vue",
    ".xml": "XML",
}
"""Frequent extensions of one language only, where nothing more has to be asked."""

_MODELINE = re.compile(rb"-\*-.*-\*-|(?:^|[ \t])(?:[vV]im?[<=>\d]*|ex):.*(?:filetype|ft|syntax)[ \t]*=", re.MULTILINE)
"""Without a match there is no modeline; go-enry takes milliseconds to find none in long lines."""
_SETS_LANGUAGE = re.compile(rb"(?:filetype|ft|syntax)[ \t]*=")
"""The part of vim's modeline that is sooner seen to be missing."""

_NO_PLAIN_YAML = (b"\n\t", b"swagger", b"openapi")
"""Without these YAML is no MiniYAML and no OpenAPI description."""

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
_VENDORED = re.compile(
    r"^(?:_esy|cache|configure|debian|dependencies|deps|dist|docs?|env|packages|rebar|vagrantfile|"
    r"jenkinsfile|waf)$|[.]d[.]ts|[.]ds_store|[.]framework|[.]git|[.]google_apis|[.]imageset|[.]indent|"
    r"[.]intellisense|[.]m4|[.]mk|[.]mvn|[.]obsidian|[.]osx|[.]sublime-|[.]teamcity|[.]vscode|[.]xctemplate|"
    r"[.]yarn|ace-builds|activator|admin_media|angular|animate|awesome|bootbox|bootstrap|bourbon|bower|bulma|carthage|"
    r"chart[.]js|ckeditor|codemirror|config[.]|controls[.]js|cordova|cpplint|d3|dojo|dotnet-install|dragdrop|"
    r"effects[.]js|extdata|extern|extjs|fabfile|fixtures|flow-typed|fontello|foundation|fuelux|fullscreen|godeps|"
    r"gradle|html5shiv|import[.]|jquery|knockout|leaflet|materialize|mathjax|microsoft|min[.]css|min[.]js|"
    r"mochikit|modernizr|mootools|mvnw|node_modules|normalize|octicons|party|pdf[.]worker|proguard|prototype|"
    r"puphpet|react|run[.]n|select2|shbrush|shcore|shlegacy|skeleton|slick[.]|sparkle|testdata|tiny_mce|vendor|"
    r"vsdoc|yahoo-|yui"
)
"""One of these is in the name of a folder or file, in lower case, wherever one of linguist's 170 patterns matches: it
is what the pattern spells out. The patterns themselves take 33 us a path."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What linguist says of one file."""

    language: str
    """Linguist's name; empty when unknown."""
    generated: bool
    vendored: bool
    documentation: bool | None = None
    """As .gitattributes say; None: see :func:`is_documentation`."""
    detectable: bool | None = None
    """Whether .gitattributes say that it counts as code; None when they are silent."""


UNKNOWN = Traits("", generated=False, vendored=False)


def identify(path: str, content: bytes) -> Traits:
    """Language and kind of a file; an empty one has no language.

    Args:
        path: path within the source; need not be valid Unicode.
        content: the whole file, in UTF-8 or an 8-bit encoding.
    """
    name = _safe(path)
    return Traits(
        language=_language(name, content) if content else "",
        generated=generated.is_generated(name, content),
        vendored=_is_vendored(name),
    )


def _language(name: str, content: bytes) -> str:
    """In linguist's order: modeline, filename, shebang, extension, and then what the content says."""
    begin = content[:_CONSIDERED]
    if language := _by_modeline(content):
        return language
    base = name.rpartition("/")[2]
    if language := _by_filename(base):
        return language
    extension = os.path.splitext(base)[1].lower()
    if (amended := amendments.language(name, extension, begin)) is not None:
        return amended
    if not content.startswith(b"#!"):
        if language := _by_extension(base):
            return language
        if extension == ".h":
            return _of_header(begin)
        if extension == ".json" and b'"swagger"' not in begin and b'"openapi"' not in begin:
            return "JSON with Comments" if base.lower().endswith(".tsconfig.json") else "JSON"
        if extension in {".yml", ".yaml"} and not any(hint in b"\n" + begin for hint in _NO_PLAIN_YAML):
            return "YAML"
    return str(enry.get_language(name, begin))


def _by_modeline(content: bytes) -> str:
    """As an editor's line among the first or the last five says, like ``vim: ft=ruby``."""
    first, last = content.split(b"\n", 5), content.rsplit(b"\n", 6)
    lines = b"\n".join(first if len(first) < 6 else [*first[:5], *last[1:]])
    if b"-*-" not in lines and _SETS_LANGUAGE.search(lines) is None:
        return ""
    if _MODELINE.search(lines) is None or b"UseVimball" in lines:
        return ""
    return str(enry.get_language_by_modeline(lines).language)


@lru_cache(maxsize=1 << 14)
def _by_filename(base: str) -> str:
    if base.lower() == "hosts":
        return ""  # of two languages: the content decides
    return amendments.FILENAMES.get(base) or str(enry.get_language_by_filename(base).language)


@lru_cache(maxsize=1 << 14)
def _by_extension(base: str) -> str:
    """The language of an extension that only one has; empty for others, and for the rarer."""
    language = _ONLY.get(os.path.splitext(base)[1], "")
    # Of several dots an earlier one may begin a longer extension, such as .blade.php.
    return language if base.count(".") == 1 or enry.get_language_by_extension(base).language == language else ""


def _of_header(content: bytes) -> str:
    lines = b"\n" + content + b"\n"
    if (b"@" in lines or b"#import" in lines) and _OBJECTIVE_C.search(lines):
        return "Objective-C"
    return "C++" if _CPP.search(lines) or _CPP_ANYWHERE.search(lines) else "C"


def is_documentation(path: str) -> bool:
    """Whether linguist takes the path for documentation."""
    return bool(enry.is_documentation(_safe(path)))


def from_path(path: str) -> Traits:
    """What can be said without the content."""
    name = _safe(path)
    base = name.rpartition("/")[2]
    extension = os.path.splitext(base)[1].lower()
    language = (
        _by_filename(base) or amendments.EXTENSIONS.get(extension) or str(enry.get_language_by_extension(name).language)
    )
    return Traits(
        language=language,
        generated=generated.by_path(name),
        vendored=_is_vendored(name),
    )


def is_binary(content: bytes) -> bool:
    """Linguist's rule: a byte order mark of UTF-16 or UTF-32 means text; else some signatures, and any NUL, binary."""
    if content.startswith(_TEXT_BOMS):
        return False
    return content.startswith(_BINARY) or b"\0" in content[:_LOOKED_AT]


def _is_vendored(path: str) -> bool:
    """Whether linguist takes the path for vendored; asked only where a part of it can make it so."""
    names = path.split("/")
    if amendments.VENDORED & set(names[:-1]):
        return True
    return any(map(_hints_at_vendored, names)) and bool(enry.is_vendor(path))


@lru_cache(maxsize=1 << 14)
def _hints_at_vendored(name: str) -> bool:
    return _VENDORED.search(name.lower()) is not None


@lru_cache(maxsize=2048)
def is_code(language: str) -> bool:
    """Whether linguist's language is one to learn from."""
    return language in ALSO_CODE or _type(language) == "programming"


@lru_cache(maxsize=2048)
def by_name(name: str) -> str:
    """The language of a name or alias in any case ("golang", "Common-Lisp"); empty when there is none."""
    for alias in (name, name.partition(",")[0]):
        for spelled in (alias, alias.replace("-", "_"), alias.replace("-", " ")):
            # A modeline is the only place where go-enry looks an alias up.
            if known := re.fullmatch(r"[^:;\s]+", spelled) and _by_modeline(f"-*- mode: {spelled}; -*-".encode()):
                return known
            if newer := next((each for each in amendments.TYPES if each.lower() == spelled.lower()), ""):
                return newer
    return ""


def is_known(language: str) -> bool:
    """Whether linguist has a language of that name."""
    return _type(language) != "unknown"


@lru_cache(maxsize=2048)
def _type(language: str) -> str:
    return amendments.TYPES.get(language) or str(enry.get_language_type(language))


def _safe(path: str) -> str:
    """A NUL would cut the path off in C, and a lone surrogate cannot be encoded."""
    return path.replace("\0", "_").encode(errors="replace").decode()
