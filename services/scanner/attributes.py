"""What a source's own .gitattributes say of its files (gitattributes(5), and github-linguist's overrides).

Honoured only where the source's settings ask for it: a repository of grammars that marks its content as vendored would
else leave next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from services.scanner import languages
from services.scanner.languages import Traits

FILE = ".gitattributes"
_KNOWN = ("linguist-generated", "linguist-vendored", "linguist-language", "linguist-detectable")
_OFF = frozenset({"false", "0", "no", "off"})


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
        # A file deeper down is nearer to what it speaks of: it comes later, and the last word counts.
        for path in sorted(texts, key=lambda path: (path.count("/"), path)):
            folder = path.removesuffix(FILE)
            self._rules += [rule for line in texts[path].splitlines() if (rule := _rule(line, folder)) is not None]

    def apply(self, path: str, traits: Traits) -> Traits:
        """The file's traits, as its attributes have them."""
        found: dict[str, str | None] = {}
        for rule in self._rules:
            if rule.pattern.fullmatch(path):
                found.update(rule.attributes)
        generated, vendored = found.get("linguist-generated"), found.get("linguist-vendored")
        language, detectable = found.get("linguist-language"), found.get("linguist-detectable")
        if generated is not None:
            traits = replace(traits, generated=generated not in _OFF)
        if vendored is not None:
            traits = replace(traits, vendored=vendored not in _OFF)
        if language and (known := languages.by_name(language)):
            traits = replace(traits, language=known)
        if detectable is not None and detectable in _OFF:
            traits = replace(traits, language="")
        return traits


NONE = Attributes({})
"""Of a source whose attributes are not honoured."""


def _rule(line: str, folder: str) -> _Rule | None:
    line = line.strip()
    if not line or line.startswith(("#", "[attr]", "!")):
        return None
    if line.startswith('"'):  # C-style quoting, for patterns with blanks
        pattern, _, rest = line[1:].partition('"')
        words = rest.split()
    else:
        pattern, *words = line.split()
    told: dict[str, str | None] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith("-"):
            name, value = name[1:], "false"
        elif name.startswith("!"):
            told[name[1:]] = None
            continue
        told[name] = value or "true"
    told = {name: value for name, value in told.items() if name in _KNOWN}
    if not told or pattern.endswith("/"):  # folders have no content of their own
        return None
    return _Rule(_regex(pattern, folder), told)


@lru_cache(maxsize=4096)
def _regex(pattern: str, folder: str) -> re.Pattern[str]:
    """Matches whole paths; a pattern without slash matches at any depth below its folder."""
    anchored = "/" in pattern
    parts = re.split(r"(\*\*/|/\*\*$|^\*\*$|\*|\?|\[!?[^\]]*\])", pattern.removeprefix("/"))
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
