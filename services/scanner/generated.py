"""Whether a program wrote a file: the rules of github-linguist 9.6.

go-enry has the rules of older versions only: it takes build wrappers, some lock files, generated Dart, Sorbet's
interfaces and more for people's work.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

_LINES = 40
"""The most lines at the begin of a file that a rule reads."""


class _Lines:
    """A file's lines as linguist counts them: a line end at the end begins another, empty one."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.count = content.count(b"\n") + 1 if content else 0
        self.head = content.split(b"\n", _LINES)[:_LINES] if content else []

    @property
    def last_two(self) -> list[bytes]:
        return self.content.rsplit(b"\n", 2)[-2:] if self.content else []


_Rule = Callable[[_Lines], bool]


def is_generated(path: str, content: bytes) -> bool:
    """Whether path or content say so.

    Args:
        path: path within the source, with slashes.
        content: the whole file.
    """
    if by_path(path):
        return True
    extension = os.path.splitext(path)[1]
    rules = (*_BY_EXTENSION.get(extension, ()), *_BY_ANY_CASE.get(extension.lower(), ()))
    if not rules and not path.endswith("ppport.h"):
        return False
    lines = _Lines(content)
    if path.endswith("ppport.h") and lines.count > 10 and b"Automatically created by Devel::PPPort" in lines.head[8]:
        return True
    return any(rule(lines) for rule in rules)


def by_path(path: str) -> bool:
    """Whether the path alone says so."""
    lowered = path.lower()
    if _PATH_MARK.search(lowered) is None:
        return False
    return any(mark in lowered and rule.search(path) for mark, rule in _BY_PATH)


# What a lowered path has to contain, which is quickly seen, and the rule itself.
_BY_PATH = tuple(
    (mark, re.compile(rule))
    for mark, rule in (
        (".nib", r"[^/]\.nib\Z"),
        (".xc", r"[^/]\.(?:xcworkspacedata|xcuserstate)\Z"),
        (".idea/", r"(?:^|/)\.idea/"),
        ("pods/", r"(?:^|/)Pods/"),
        ("carthage/", r"(?:^|/)Carthage/Build/"),
        ("__generated__/", r"__generated__/"),
        (".designer.", r"(?i)\.designer\.(?:cs|vb)$"),
        (".feature.cs", r"(?i)\.feature\.cs$"),
        ("node_modules/", r"node_modules/"),
        ("vendor/", r"vendor/(?:(?!-)[-0-9A-Za-z]+(?<!-)\.)+(?:com|edu|gov|in|me|net|org|fm|io)"),
        ("godeps/", r"Godeps/"),
        ("htmlcov/", r"(?:^|/)htmlcov/"),
        (".lock", r"composer\.lock|Cargo\.lock|deno\.lock|(?:Gopkg|glide)\.lock|poetry\.lock|pdm\.lock|uv\.lock"),
        (".lock", r"pixi\.lock|Pipfile\.lock|(?:^|/)(?:flake\.lock|MODULE\.bazel\.lock|bun\.lockb?)$"),
        (".lock", r"(?:^|/)(?:mise(?:\.[^/]+)?\.lock|\.terraform\.lock\.hcl)$"),
        ("lock", r"(?:^|/)(?:\w+\.)?esy.lock$|package-lock\.json|pnpm-lock\.yaml"),
        ("shrinkwrap", r"npm-shrinkwrap\.json"),
        ("package.resolved", r"Package\.resolved"),
        (".pnp.", r"(?:^|/)\.pnp\..*$"),
        (".zep.", r".\.zep\.(?:c|h|php)$"),
        (".toml.orig", r"Cargo\.toml\.orig"),
        ("gradlew", r"(?i)(?:^|/)gradlew(?:\.bat)?$"),
        ("mvnw", r"(?i)(?:^|/)mvnw(?:\.cmd)?$"),
        ("manifest", r"(?:^|/)(?:Julia)?Manifest(?:-v\d+\.\d+)?\.toml$"),
        ("_tlb.pas", r"(?i)_tlb\.pas$"),
        (".sqlx/", r"(?:^|/)\.sqlx/query-[a-f\d]{64}\.json$"),
        (".map", r"(?i)(?:\.css|\.js)\.map$"),
    )
)
_PATH_MARK = re.compile("|".join(re.escape(mark) for mark, _ in _BY_PATH))


def _says(*texts: bytes, first: int, least: int = 2) -> _Rule:
    """One of the first lines contains one of the texts."""

    def rule(lines: _Lines) -> bool:
        return lines.count >= least and any(text in line for line in lines.head[:first] for text in texts)

    return rule


def _line(number: int, *texts: bytes, least: int = 0, starts: bool = False) -> _Rule:
    """The line of that number, from 1, contains one of the texts, or starts with it."""

    def rule(lines: _Lines) -> bool:
        if lines.count < max(2, number, least):
            return False
        line = lines.head[number - 1]
        return line.startswith(texts) if starts else any(text in line for text in texts)

    return rule


def _minified(lines: _Lines) -> bool:
    return lines.count > 0 and (len(lines.content) - lines.count + 1) // lines.count > 110


_SOURCE_MAP_URL = re.compile(rb"\A/[*/][#@] source(?:Mapping)?URL|sourceURL=")


def _has_source_map(lines: _Lines) -> bool:
    return any(_SOURCE_MAP_URL.search(line) for line in lines.last_two)


_SOURCE_MAP = re.compile(rb'\{"version":\d+,|/\*\* Begin line maps\. \*\*/\{')


def _source_map(lines: _Lines) -> bool:
    return lines.count > 0 and _SOURCE_MAP.match(lines.head[0]) is not None


_COFFEE_TEMPORARY = re.compile(rb"_fn|_i|_len|_ref|_results")
_COFFEE_HELPER = re.compile(rb"__bind|__extends|__hasProp|__indexOf|__slice")


def _coffeescript(lines: _Lines) -> bool:
    if not lines.count:
        return False
    if lines.head[0].startswith(b"// Generated by "):
        return True
    if lines.head[0] != b"(function() {" or lines.last_two != [b"}).call(this);", b""]:
        return False
    declaring = [line for line in lines.content.split(b"\n") if b"var " in line]
    score = sum(len(_COFFEE_TEMPORARY.findall(line)) + 3 * len(_COFFEE_HELPER.findall(line)) for line in declaring)
    return score >= 3


_PEG = re.compile(rb"(?:[^/]|/[^*])*/\*(?:[^*]|\*[^/])*Generated by PEG.js")


def _peg(lines: _Lines) -> bool:
    begin = b"".join(lines.head[:5])
    return b"Generated by PEG" in begin and _PEG.match(begin) is not None


def _net_documentation(lines: _Lines) -> bool:
    return (
        lines.count > 3
        and b"<doc>" in lines.head[1]
        and b"<assembly>" in lines.head[2]
        and b"</doc>" in lines.last_two[0]
    )


_FONT = re.compile(rb"^\s*(?:currentfile eexec\s+|/sfnts\s+\[\s<)", re.MULTILINE)
_CREATOR_PROGRAM = re.compile(
    rb"[0-9]|draw|mpage|ImageMagick|inkscape|MATLAB|PCBNEW|pnmtops|\(Unknown\)|Serif Affinity|Filterimage -tops"
)


def _postscript(lines: _Lines) -> bool:
    if _FONT.search(lines.content):
        return True
    creator = next((line for line in lines.head[:10] if line.startswith(b"%%Creator: ")), b"")
    if _CREATOR_PROGRAM.search(creator):
        return True
    return b"EAGLE" in creator and any(line.startswith(b"%%Title: EAGLE Drawing ") for line in lines.head[:5])


def _vcr_cassette(lines: _Lines) -> bool:
    return lines.count > 2 and b"recorded_with: VCR" in lines.last_two[0]


def _go(lines: _Lines) -> bool:
    return lines.count > 1 and any(line.startswith(b"// Code generated ") for line in lines.head[:40])


def _jni_header(lines: _Lines) -> bool:
    return (
        lines.count > 2
        and b"/* DO NOT EDIT THIS FILE - it is machine generated */" in lines.head[0]
        and b"#include <jni.h>" in lines.head[1]
    )


_DART = re.compile(rb"generated code\W{2,3}do not modify")


def _dart(lines: _Lines) -> bool:
    return lines.count > 1 and any(_DART.search(line.lower()) for line in lines.head[:3])


_GAME_MAKER = re.compile(rb"\d\.\d\.\d.+\|\{")


def _game_maker(lines: _Lines) -> bool:
    begin = b"".join(lines.head[:3]).lstrip()
    return lines.count > 3 and (begin.startswith((b"{", b"[")) or _GAME_MAKER.match(lines.head[0]) is not None)


_GIMP = re.compile(
    rb"/\* GIMP [a-zA-Z0-9\- ]+ C-Source image dump \(.+?\.c\) \*/"
    rb"|/\*  GIMP header image file format \([a-zA-Z0-9\- ]+\): .+?\.h  \*/"
)


def _gimp(lines: _Lines) -> bool:
    return lines.count > 0 and _GIMP.match(lines.head[0]) is not None


_TAPIOCA = re.compile(rb"# Please (?:run|instead update this file by running) `bin/tapioca")


def _sorbet(lines: _Lines) -> bool:
    return (
        lines.count >= 5
        and lines.head[0].startswith(b"# typed:")
        and b"DO NOT EDIT MANUALLY" in lines.head[2]
        and _TAPIOCA.match(lines.head[4]) is not None
    )


_DOXYGEN = re.compile(rb"<!--\s+Generated by Doxygen\s+[.0-9]+\s*-->", re.IGNORECASE)
_META = re.compile(rb"<meta(\s+[^>]++)>", re.IGNORECASE)
_META_ATTRIBUTE = re.compile(rb"""(?:^|(?<=\s))(name|content|value)\s*=\s*("[^"]+"|'[^']+'|[^\s"']+)""", re.IGNORECASE)
_GENERATOR = re.compile(rb"(?:org\s+mode|j?latex2html|groff|makeinfo|texi2html|ronn)\b", re.IGNORECASE)


def _html(lines: _Lines) -> bool:
    if lines.count < 2:
        return False
    if any(b"<!-- Generated by pkgdown: do not edit by hand -->" in line for line in lines.head[:2]):
        return True
    if lines.count > 2 and lines.head[2].startswith(b"<!-- This is an automatically generated file."):
        return True
    head = lines.head[:31]
    if any(_DOXYGEN.search(line) for line in head):
        return True
    for meta in _META.findall(b" ".join(head)):
        told = _META_ATTRIBUTE.findall(meta.removesuffix(b"/").strip())
        values = {name.lower(): value.strip(b"\"'") for name, value in told}
        by = values.get(b"content", b""), values.get(b"value", b"")
        if values.get(b"name", b"").lower() == b"generator" and any(map(_GENERATOR.match, by)):
            return True
    return False


def _table(rules: Iterable[tuple[str, _Rule]]) -> dict[str, tuple[_Rule, ...]]:
    """By extension; a rule is given with all of its extensions."""
    table: dict[str, list[_Rule]] = defaultdict(list)
    for extensions, rule in rules:
        for extension in extensions.split():
            table[extension].append(rule)
    return {extension: tuple(of_it) for extension, of_it in table.items()}


_BY_EXTENSION = _table(
    [
        (".js", _coffeescript),
        (".js", _peg),
        (".js", _line(1, b"/* parser generated by jison ", b"/* generated by jison-lex ", starts=True)),
        (".js", _line(6, b"GENERATED CODE -- DO NOT EDIT!", least=7)),
        (".ts", _line(1, b"Code generated by protoc-gen-ts_proto. DO NOT EDIT.", least=5)),
        (".g", _line(2, b"generated by Xtest", least=3)),
        (".ps .eps .pfa", _postscript),
        (".c .cpp", _line(1, b"Generated by Cython")),
        (".go", _go),
        (".proto", _says(b"This file was autogenerated by go-to-protobuf", first=20)),
        (
            ".py .java .h .cc .cpp .m .rb .php",
            _says(b"Generated by the protocol buffer compiler.  DO NOT EDIT!", first=3),
        ),
        (
            ".rb .py .go .js .m .java .h .cc .cpp .php",
            _says(b"Autogenerated by Thrift Compiler", first=6, least=1),
        ),
        (".js .py .lua .cpp .h .java .cs .php", _says(b"Generated by Haxe", first=3, least=1)),
        (".h", _jni_header),
        (".yml", _vcr_cassette),
        (".mod", _line(1, b"PCBNEW-LibModule-V", b"GFORTRAN module version '")),
        (".meta", _line(1, b"fileFormatVersion: ")),
        (".rb", _line(3, b"# This file is automatically generated by Racc", starts=True)),
        (
            ".java",
            _line(
                1,
                b"/* The following code was generated by JFlex ",
                b"// This is a generated file. Not intended for manual editing.",
                starts=True,
            ),
        ),
        (".Rd", _line(1, b"% Generated by roxygen2: do not edit by hand")),
        (".cpp .hpp .h .cc", _line(1, b"// Generated by the gRPC", starts=True)),
        (".dart", _dart),
        (".yy .yyp", _game_maker),
        (".c .h", _gimp),
    ]
)

_BY_ANY_CASE = _table(
    [
        (".js .css", _minified),
        (".js .css", _has_source_map),
        (".map", _source_map),
        (".xml", _net_documentation),
        (".dsp", _says(b"# Microsoft Developer Studio Generated Build File", first=3, least=1)),
        (".html .htm .xhtml", _html),
        (".java", _says(b"This file is generated by jOOQ.", first=2, least=1)),
        (".rbi", _sorbet),
        (".frm", _says(b"TYPE=VIEW", first=1, least=1)),
    ]
)
