"""Syntax trees of source files, for cuts that take whole expressions, statements and blocks.

The grammars are tree-sitter's, one wheel a language with the parser compiled in: nothing is fetched when a run starts.
Other languages have no tree; their files are cut at lines and characters alone.
"""

from __future__ import annotations

import importlib
from functools import cache

from tree_sitter import Language, Node, Parser

_GRAMMARS = {
    "Python": ("tree_sitter_python", "language"),
    "JavaScript": ("tree_sitter_javascript", "language"),
    "JSX": ("tree_sitter_javascript", "language"),
    "TypeScript": ("tree_sitter_typescript", "language_typescript"),
    "TSX": ("tree_sitter_typescript", "language_tsx"),
    "Java": ("tree_sitter_java", "language"),
    "Go": ("tree_sitter_go", "language"),
    "C": ("tree_sitter_c", "language"),
    "C++": ("tree_sitter_cpp", "language"),
    "C#": ("tree_sitter_c_sharp", "language"),
    "Rust": ("tree_sitter_rust", "language"),
    "Ruby": ("tree_sitter_ruby", "language"),
    "PHP": ("tree_sitter_php", "language_php"),
    "Kotlin": ("tree_sitter_kotlin", "language"),
    "Scala": ("tree_sitter_scala", "language"),
    "Swift": ("tree_sitter_swift", "language"),
    "Shell": ("tree_sitter_bash", "language"),
    "Lua": ("tree_sitter_lua", "language"),
}
"""Module and function of a grammar, by linguist's name of the language."""
LANGUAGES = frozenset(_GRAMMARS)

_LONGEST = 1_000_000
"""Characters of a file that is still parsed: error recovery in a huge generated one may take minutes."""


class SyntaxTree:
    """The tree of one file. Places are characters of its text."""

    def __init__(self, language: str, text: str) -> None:
        self._data = text.encode()
        self._is_ascii = len(self._data) == len(text)
        self._text = text
        self._root = Parser(_grammar(language)).parse(self._data).root_node

    def nodes_at(self, place: int, start: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of the nodes around a character that lie within a part of the text, innermost first.

        Only whole pieces of syntax: of more than one token, without an error inside, and less than the part itself.
        """
        at = self._to_byte(place)
        low, high = self._to_byte(start), self._to_byte(end)
        node: Node | None = self._root.named_descendant_for_byte_range(at, at + 1)
        found: list[tuple[int, int]] = []
        while node is not None and not node.has_error and low <= node.start_byte and node.end_byte <= high:
            span = (node.start_byte, node.end_byte)
            if (
                node.is_named
                and node.child_count
                and node.parent is not None
                and span not in (*found[-1:], (low, high))
            ):
                found.append(span)
            node = node.parent
        return [(self._to_char(first), self._to_char(second)) for first, second in found]

    def _to_byte(self, place: int) -> int:
        return place if self._is_ascii else len(self._text[:place].encode())

    def _to_char(self, place: int) -> int:
        return place if self._is_ascii else len(self._data[:place].decode())


def parse(language: str, text: str) -> SyntaxTree | None:
    """The tree of a file; None without a grammar for its language (linguist's name), or when it is too long."""
    return SyntaxTree(language, text) if language in _GRAMMARS and len(text) <= _LONGEST else None


@cache
def _grammar(language: str) -> Language:
    module, function = _GRAMMARS[language]
    return Language(getattr(importlib.import_module(module), function)())
