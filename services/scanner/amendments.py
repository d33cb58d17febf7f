"""Where github-linguist 9.6 names another language than go-enry, which has the data of an older version.

Patterns and tables are linguist's own, of its heuristics.yml, languages.yml and generic.yml.
"""

from __future__ import annotations

import re

import enry

VENDORED = {"xvba_modules"}
"""Folders."""

FILENAMES = {
    ".eslint-ignore": "Ignore List",
    "Eask": "Emacs Lisp",
    "Makefile.pc": "Makefile",
    "README.pc": "Text",
    "gtkrc": "GtkRC",
    "gtkrc-2.0": "GtkRC",
    "mise.local.lock": "TOML",
    "mise.lock": "TOML",
    "robots.txt": "Robots Exclusion Rules",
}

EXTENSIONS = {
    ".baml": "BAML",
    ".container": "INI",
    ".fbs": "FlatBuffers",
    ".gtkrc": "GtkRC",
    ".icls": "XML",
    ".il": "IL Assembly",
    ".liq": "Liquidsoap",
    ".metta": "MeTTa",
    ".mount": "INI",
    ".opy": "OverPy",
    ".pq": "Power Query",
    ".qnt": "Quint",
    ".service": "INI",
    ".slnlaunch": "JSON",
    ".socket": "INI",
    ".timer": "INI",
    ".txtpb": "Protocol Buffer Text Format",
    ".vmf": "Valve Data Format",
    ".zed": "SpiceDB Schema",
}

TYPES = {
    **dict.fromkeys(
        ("BAML", "IL Assembly", "Liquidsoap", "MeTTa", "OverPy", "Power Query", "Pro*C", "Quint", "Redscript"),
        "programming",
    ),
    **dict.fromkeys(("FlatBuffers", "GtkRC", "Robots Exclusion Rules", "SpiceDB Schema", "pkg-config"), "data"),
}
"""Of the languages that go-enry does not know."""

_GENERIC = {
    *(".action", ".alg", ".app", ".cmp", ".msg", ".network", ".resource"),
    *(".sol", ".srv", ".stl", ".tag", ".target", ".url"),
}
"""Extensions of so many things that they alone name no language."""

_SECTION = re.compile(rb"^[#\s]*\[[^\]]+\]\s*$", re.MULTILINE)
_KEY = re.compile(rb"^[^#!;][^=]*=", re.MULTILINE)
_PROSE = re.compile(rb"^[^#;=\[]+[^ \r\n=]$", re.MULTILINE)
_EMBEDDED_SQL = re.compile(rb"^\s*EXEC\s+SQL\s", re.MULTILINE)
_RED = re.compile(rb"^\s*Red(?:/System)?\s*\[", re.MULTILINE | re.IGNORECASE)
_GO_TEMPLATE = re.compile(rb'\{\{-?\s*(?:`?"\\?"?|/\*\s|\w*)\b')
_SMARTY = re.compile(rb"(?<!\{)\{(?:\*\s|\$|/)?\w*\b")
_HOSTS = re.compile(
    rb"^(?!\.)(?:\.?(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\b){4}(?:/(?:3[0-2]|[12]?\d)\b)?"
    rb"(?:[ \t]+\w[-\w]*(?:\.\w[-\w]*)*(?<!-)\b)*+(?:$|\s)",
    re.MULTILINE | re.IGNORECASE,
)
_BLOCKER = rb"(?:(?:[Aa]d[Bb]lock(?:[ \t][Pp]lus)?|u[Bb]lock(?:[ \t][Oo]rigin)?|[Aa]d[Gg]uard)(?:[ \t]\d+(?:\.\d+)*+)?)"
_ADBLOCK = re.compile(rb"\A\[" + _BLOCKER + rb"(?:[ \t]?;[ \t]?" + _BLOCKER + rb")*+\]")


def language(name: str, extension: str, content: bytes) -> str | None:
    """The language where linguist differs, empty when it knows none; None where go-enry is to be asked.

    Args:
        name: the path.
        extension: its last one, lowered, with the dot.
        content: its begin.
    """
    if content.startswith(b"#!"):
        line = content.partition(b"\n")[0]
        return "JavaScript" if extension == ".js" and (b"deno" in line or b"bun" in line) else None
    if known := EXTENSIONS.get(extension):
        return known
    match extension:
        case ".network" | ".target" if _SECTION.search(content) and _KEY.search(content) and not _PROSE.search(content):
            return "INI"
        case _ if extension in _GENERIC:
            return _of_content(name, content)
        case ".pc":
            return "Pro*C" if _EMBEDDED_SQL.search(content) else "pkg-config"
        case ".in" if name.lower().endswith(".pc.in"):
            return "pkg-config"
        case ".reds":
            return "Red" if _RED.search(content) else "Redscript"
        case ".tpl" if _GO_TEMPLATE.search(content):
            return "Go Template"
        case ".tpl" if _SMARTY.search(content):
            return "Smarty"
        case ".txt" if _ADBLOCK.search(content):
            return "Adblock Filter List"
        case ".txt" if _HOSTS.search(content):
            return "Hosts File"
        case ".vba" if re.search(rb"^UseVimball", content, re.MULTILINE):
            return "Vim Script"
    return None


def _of_content(name: str, content: bytes) -> str:
    if b"<?xml version=" in b"\n".join(content.split(b"\n", 2)[:2]):
        return "XML"
    return str(enry.get_language_by_content(name, content).language)
