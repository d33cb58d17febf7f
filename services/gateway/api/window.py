"""Where a prompt begins when the editor itself cuts the file, so many lines before the cursor.

llama.vscode and llama.vim send the 256 lines above: with every new line their text begins one line later, and a
prompt that begins elsewhere finds nothing in the KV cache. So a long text is cut once more, at a line that its
content chooses. While that line is among the first of the text, prompts of one place begin at it, wherever the
editor's window does. The least hash of a sliding window is a usual way to that (winnowing: Schleimer, Wilkerson,
Aiken, SIGMOD 2003). On a new line 41 tokens are computed anew instead of 837 (bench/windows.py).
"""

from __future__ import annotations

import hashlib

LINES = 128
"""Shorter texts stay whole: they may well begin where the file does, with its imports. So much is more than a prompt
has room for by default (1,024 tokens, of code about 100 lines), where inference cuts anyway."""
SHARE = 4
"""The line is looked for in this part of the text: an eighth of it, the farthest from the cursor, is lost on average,
and a new line is chosen after about an eighth of its lines was typed."""


def steady(text: str) -> str:
    """The text from that line on; a short one as it is."""
    lines = text.splitlines(keepends=True)
    if len(lines) < LINES:
        return text
    first = lines[: len(lines) // SHARE + 1]
    # With the line after it: braces and blank lines are everywhere.
    starts = [place for place in range(len(first) - 1) if first[place].strip()]
    chosen = min(starts, key=lambda place: _hash(first[place] + first[place + 1]), default=0)
    return "".join(lines[chosen:])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
