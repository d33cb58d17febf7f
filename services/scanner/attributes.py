"""What a source's own .gitattributes say of its files (gitattributes(5), and github-linguist's overrides).

Honoured only where the source's settings ask for it: a repository of grammars that marks its content as vendored would
else leave next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from services.scanner import languages
from services.scanner.languages import Traits

FILE = ".gitattributes"
_LANGUAGE = "linguist-language"
_FLAGS = ("generated", "vendored", "documentation", "detectable")
_KNOWN = frozenset({_LANGUAGE, *(f"linguist-{flag}" for flag in _FLAGS)})


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    attributes: Mapping[str, str | None]
    """Name to value; None where the line makes it unspecified again."""


class Attributes:
    """The overrides of one source.

    Args:
        texts: content of each .gitattributes by its path; lines that cannot be read are passed over, as git does.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._rules: list[_Rule] = []
        macros = _macros(texts.get(FILE, ""))
        # A file deeper down is nearer to what it speaks of: it comes later, and the last word counts.
        for path in sorted(texts, key=lambda path: (path.count("/"), path)):
            folder = path.removesuffix(FILE)
            lines = texts[path].splitlines()
            self._rules += [rule for line in lines if (rule := _rule(line, folder, macros)) is not None]

    def apply(self, path: str, traits: Traits) -> Traits:
        """The file's traits, as its attributes have them."""
        if not self._rules:
            return traits
        found: dict[str, str | None] = {}
        for rule in self._rules:
            if rule.pattern.fullmatch(path):
                found.update(rule.attributes)
        told: dict[str, Any] = {
            flag: value != "false" for flag in _FLAGS if (value := found.get(f"linguist-{flag}")) is not None
        }
        language = found.get(_LANGUAGE, "true")
        if language not in (None, "true", "false"):
            traits = replace(traits, language=languages.by_name(language))
        return replace(traits, **told)


_Told = dict[str, str | None]


def _macros(text: str) -> dict[str, _Told]:
    """Names that stand for several attributes; only the file at the top can define them."""
    macros: dict[str, _Told] = {}
    for line in text.splitlines():
        if line.strip().startswith("[attr]") and (words := line.strip().removeprefix("[attr]").split()):
            macros[words[0]] = _attributes(words[1:], macros)
    return macros


def _rule(line: str, folder: str, macros: Mapping[str, _Told]) -> _Rule | None:
    line = line.strip()
    if not line or line.startswith(("#", "[attr]", "!")):
        return None
    if line.startswith('"'):  # C-style quoting, for patterns with blanks
        pattern, _, rest = line[1:].partition('"')
        words = rest.split()
    else:
        pattern, *words = line.split()
    told = {name: value for name, value in _attributes(words, macros).items() if name in _KNOWN}
    if not told or pattern.endswith("/"):  # folders have no content of their own
        return None
    return _Rule(_regex(pattern, folder), told)


def _attributes(words: Iterable[str], macros: Mapping[str, _Told]) -> _Told:
    told: _Told = {}
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith("-"):
            told[name[1:]] = "false"
        elif name.startswith("!"):
            told[name[1:]] = None
        else:
            told[name] = value if "=" in word else "true"
            told.update(macros.get(name, {}))
    return told


@lru_cache(maxsize=4096)
def _regex(pattern: str, folder: str) -> re.Pattern[str]:
    """Matches whole paths; a pattern without slash matches at any depth below its folder."""
    anchored = "/" in pattern
    parts = re.split(r"(\\.|\*\*/|/\*\*$|^\*\*$|\*|\?|\[!?[^\]]*\])", pattern.removeprefix("/"))
    out = []
    for part in parts:
        match part:
            case "**/":
                out.append("(?:.*/)?")
            case "/**":
                out.append("/.*")
            case "**":
                out.append(".*" if anchored else "[^/]*")
            case "*":
                out.append("[^/]*")
            case _ if part.startswith("\\"):
                out.append(re.escape(part[1:]))
            case "?":
                out.append("[^/]")
            case _ if part.startswith("[") and part.endswith("]") and len(part) > 2:
                out.append("[" + ("^" + part[2:-1] if part[1] == "!" else part[1:-1]).replace("\\", "\\\\") + "]")
            case _:
                out.append(re.escape(part))
    try:
        return re.compile(re.escape(folder) + ("" if anchored else "(?:.*/)?") + "".join(out))
    except re.error:  # a class that is none, like [z-a]: git matches nothing with it
        return re.compile(r"(?!)")


NONE = Attributes({})
"""Of a source whose attributes are not honoured."""
