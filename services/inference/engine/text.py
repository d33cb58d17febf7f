"""From tokens to text: never half a character, and the end where a stop string begins. Imports no torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from services.core.models.spelling import Overhang


class TextStream:
    """The text of one sequence, token by token.

    Text that may still turn out to be the begin of a stop string is held back until that is decided, so stop strings
    are found across token borders and never sent in part.

    Args:
        vocabulary: bytes of every token id (services/core/models/spelling).
        stop: generation ends before the first of these.
        suffix_stop: more of them, each one line with its newline (:func:`suffix_stop`); the end of the text counts as
            that newline.
        single_line: it ends at the end of the first line that is not blank.
        overhang: what generation has to repeat before anything new; not part of the output.
    """

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        *,
        stop: Sequence[str] = (),
        suffix_stop: Sequence[str] = (),
        single_line: bool = False,
        overhang: Overhang | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._stop = [s for s in (*stop, *suffix_stop) if s]
        self._suffix_lines = {s[:-1] for s in suffix_stop}
        self._single_line = single_line
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._line_has_text = False
        self.overhang = overhang or Overhang()
        """What is still to be repeated; the sampler keeps to it."""
        self.overhang_size = len(self.overhang.left)
        """Most tokens that only repeat it."""
        self.repeating = False
        """Whether the last token only repeated overhang."""
        self.stopped = False
        """Whether a stop was reached: nothing comes any more."""

    def push(self, token: int) -> str:
        """The text that is certain by now."""
        data = self._vocabulary[token]
        self.repeating = False
        if self.overhang.left:
            self.overhang, data = self.overhang.after(token, data)
            self.repeating = not data
        return self._advance(self._decoder.decode(data))

    def flush(self) -> str:
        """The held-back text, at the end of the sequence; a cut character is dropped."""
        held, self._held = self._held, ""
        return "" if self.stopped or held in self._suffix_lines else held

    def _advance(self, new: str) -> str:
        text = self._held + new
        end = self._end_of(text)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        sent, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._line_has_text = self._line_has_text or bool(sent.strip())
        return sent

    def _end_of(self, text: str) -> int | None:
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if self._single_line:
            begin = 0 if self._line_has_text else len(text) - len(text.lstrip())
            if (at := text.find("\n", begin)) >= 0:
                ends.append(at)
        return min(ends, default=None)


def suffix_stop(suffix: str) -> tuple[str, ...]:
    """Stop strings for a model that does not see the suffix: where it would repeat the suffix's first line.

    When text follows the cursor on its own line, that rest of the line has to end a line; else the first line that is
    not blank has to come again as a whole line, indentation included.
    """
    first, _, rest = suffix.partition("\n")
    if first.strip():
        return (first.rstrip() + "\n",)
    line = next((line.rstrip() for line in rest.splitlines() if line.strip()), "")
    return (f"\n{line}\n",) if line else ()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
