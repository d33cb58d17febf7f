"""Where a text is cut into prefix, middle and suffix: a third at characters, a third at lines, a third at syntax nodes.

Cuts at random characters are what StarCoder, CodeLlama, DeepSeek-Coder and Qwen2.5-Coder were trained with; they alone
show the model cursors within a word. Cuts at syntax nodes do better on what people ask for (arXiv:2506.00204: up to 5
points on infilling benchmarks). Cuts at lines are what an editor asks for most: the rest of this line, or a few lines.
"""

from __future__ import annotations

import random

from services.trainer.corpus.syntax import SyntaxTree

MIX = {"characters": 1 / 3, "lines": 1 / 3, "syntax": 1 / 3}
"""Share of each kind. Without a tree, or where no node fits, a cut at syntax becomes one at lines."""

_TRIES = 8
"""Random places at which a node is looked for: most of a text is within one."""


def draw(text: str, start: int, end: int, tree: SyntaxTree | None, rng: random.Random) -> tuple[int, int]:
    """Begin and end of a middle within text[start:end].

    Args:
        tree: of the whole text.
    """
    (kind,) = rng.choices(list(MIX), list(MIX.values()))
    if kind == "characters":
        first, second = sorted(rng.randint(start, end) for _ in range(2))
        return first, second
    if kind == "syntax" and tree is not None and (node := _syntax_node(text, start, end, tree, rng)):
        return node
    return _lines(text, start, end, rng)


def _lines(text: str, start: int, end: int, rng: random.Random) -> tuple[int, int]:
    """One line (half of the time) or several, up to the end of the last one, the newline left out.

    They begin behind the first line's indentation, where an editor puts the cursor, or (half of the time) in the line.
    """
    lines = text[start:end].splitlines(keepends=True) or [""]
    number = rng.randrange(len(lines))
    count = 1 if rng.random() < 0.5 else rng.randint(1, len(lines) - number)
    at = start + sum(map(len, lines[:number]))
    line = lines[number].rstrip("\r\n")
    indentation = len(line) - len(line.lstrip())
    first = at + (indentation if rng.random() < 0.5 else rng.randint(0, len(line)))
    last = lines[number + count - 1]
    return first, at + sum(map(len, lines[number : number + count])) - (len(last) - len(last.rstrip("\r\n")))


def _syntax_node(text: str, start: int, end: int, tree: SyntaxTree, rng: random.Random) -> tuple[int, int] | None:
    """A node around a random place, so that large ones come up as often as their size says, at any depth alike."""
    for _ in range(_TRIES):
        place = rng.randrange(start, end)
        if not text[place].isspace() and (nodes := tree.nodes_at(place, start, end)):
            return rng.choice(nodes)
    return None
