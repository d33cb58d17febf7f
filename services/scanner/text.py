"""Text of a file: decoding, and the measures that tell code from data."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import chardet
import numpy as np

MIN_CHARACTERS = 64
"""Shorter files are exempt from shares: three constants are not "lots of digits"."""
MAX_CONTROL_SHARE = 0.03
"""Text with more control characters than this is corrupt; random bytes have 0.1."""
MAX_LINES = 100_000
MAX_MEAN_LINE = 100
MAX_LINE = 1000
MAX_ENCODED_RUN = 1024
MAX_ENCODED_SHARE = 0.5

# StarCoder 2 and The Stack v2 (arXiv:2402.19173), section 4.1: line and encoded-data filters.
_HEXADECIMAL = re.compile(r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}")
_ESCAPES = re.compile(r"\\u[0-9a-fA-F]{4}(?:\\u[0-9a-fA-F]{4}){7,}")  # what it begins with makes the search fast
_BASE64_CHARACTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/\n="
_HEXADECIMAL_CHARACTERS = b"0123456789abcdefABCDEFx,\\"
_BASE64_MARKS = bytes(ord("#") if code in _BASE64_CHARACTERS else ord(".") for code in range(256))
_HEXADECIMAL_MARKS = bytes(ord("#") if code in _HEXADECIMAL_CHARACTERS else ord(".") for code in range(256))
_BLANKS = b" \t\n\v\f\r\x1c\x1d\x1e\x1f"  # what str.split() takes for blank
_IS_NO_BLANK = bytes(code not in _BLANKS for code in range(256))
_RARE_BLANKS = [chr(code) for code in _BLANKS if chr(code) not in " \t\n\r"]
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WESTERN = "cp1252"
_ENCODINGS = (
    *(_WESTERN, "cp1250", "cp1251", "cp1253", "cp1254", "iso8859-2", "iso8859-7", "koi8-r"),
    *("cp932", "euc-jp", "gb18030", "big5", "cp949"),
)
"""What code is stored in besides UTF-8. With all that chardet knows, short texts would be taken for the rarest."""
_SURE = 0.1
"""Least confidence in anything but Windows-1252: a few accents resemble many alphabets."""
_TELLING = 1 << 14
"""Bytes of lines beyond ASCII that are enough to tell the encoding."""
WIDE = frozenset(encoding for _, encoding in _BOMS) - {"utf-8"}
"""Encodings in which ASCII is not one byte."""
_CONTROLS = bytes(code for code in (*range(0x20), 0x7F) if chr(code) not in "\b\t\n\v\f\r\x1b")
_DIGITS = b"0123456789"


class Undecodable(ValueError):
    """Bytes that are no text in any encoding we take."""


@dataclass(frozen=True, slots=True)
class Text:
    """A decoded file."""

    text: str
    """Without byte order mark; line ends as they are."""
    encoding: str
    """What it was stored in."""


def decode(data: bytes) -> Text:
    """Decodes a file: by its byte order mark, else as UTF-8, as its letters suggest, or as Latin-1.

    Raises:
        Undecodable: the bytes contradict their byte order mark, or are mostly control characters.
    """
    found = _decode(data)
    characters = data if found.encoding == "utf-8" else found.text.encode()
    controls = len(characters) - len(characters.translate(None, _CONTROLS))
    if controls > MAX_CONTROL_SHARE * len(characters):
        raise Undecodable(f"{controls} of {len(characters)} bytes are control characters")
    return found


def _decode(data: bytes) -> Text:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return Text(data[len(mark) :].decode(encoding), encoding)
            except UnicodeDecodeError as error:
                raise Undecodable(f"the byte order mark says {encoding}: {error.reason}") from None
    for encoding in _candidates(data):
        try:
            return Text(data.decode(encoding), encoding)
        except UnicodeDecodeError:
            continue
    return Text(data.decode("latin-1"), "latin-1")


def _candidates(data: bytes) -> Iterator[str]:
    yield "utf-8"
    yield _suggested(data)
    yield _WESTERN


def _suggested(data: bytes) -> str:
    """The 8-bit or multi-byte encoding in which the letters beyond ASCII make words."""
    telling = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    found = chardet.detect(telling[:_TELLING], include_encodings=_ENCODINGS)
    return found["encoding"].lower() if found["encoding"] and found["confidence"] >= _SURE else _WESTERN


def digit_share(text: str) -> float:
    """Share of the digits 0-9 among the non-whitespace characters; 0 for files under :data:`MIN_CHARACTERS`."""
    if len(text) < MIN_CHARACTERS:
        return 0.0
    if text.isascii():  # deleting from bytes is ten times as fast as splitting text
        data = text.encode()
        characters, digits = len(data.translate(None, _BLANKS)), len(data) - len(data.translate(None, _DIGITS))
    else:
        joined = "".join(text.split())
        characters, digits = len(joined), sum(joined.count(chr(digit)) for digit in _DIGITS)
    return digits / characters if characters else 0.0


def long_lines(text: str) -> str:
    """What is wrong with the length of the lines; empty when nothing is."""
    ends = text.count("\n")
    # Enough for most files, and quicker: what else splitlines() takes for the end of a line only makes lines shorter.
    is_usual = len(text) < MAX_LINES and len(text) - ends <= MAX_MEAN_LINE * ends
    if is_usual and max(map(len, text.split("\n"))) <= MAX_LINE:
        return ""
    lines = text.splitlines()
    if not lines:
        return ""
    longest = max(map(len, lines))
    mean = sum(map(len, lines)) / len(lines)
    if len(lines) > MAX_LINES:
        return f"{len(lines)} lines"
    if longest > MAX_LINE:
        return f"a line of {longest} characters"
    return f"lines of {mean:.0f} characters on average" if mean > MAX_MEAN_LINE else ""


def encoded_data(text: str) -> str:
    """What encoded data (base64, hexadecimal, escapes) dominates the file; empty when none does."""
    kinds: list[tuple[list[int], str]] = []
    # The expressions alone would be three quarters of stage 1; finding a run of equal bytes costs next to nothing.
    data = text.encode("ascii", "replace")  # a byte for every character; what is not ASCII divides runs
    marks = data.translate(_BASE64_MARKS)
    if b"#" * 64 in marks:
        kinds.append(([end - begin for begin, end in _runs(marks, 64)], "base64"))
    if b"#" * 16 in (dense := data.translate(_HEXADECIMAL_MARKS, _BLANKS)):
        # Where the runs would be with the blanks, up to the next character of another kind.
        places = np.flatnonzero(np.frombuffer(data.translate(_IS_NO_BLANK), np.bool_))
        places = np.append(places, len(data))
        regions = [(places[begin], places[end]) for begin, end in _runs(dense, 16)]
        # One character more, so that the expression sees where a word ends.
        found = [run for begin, end in regions for run in _HEXADECIMAL.finditer(text, begin, end + 1)]
        kinds.append(([len(run.group()) for run in found], "hexadecimal"))
    if "\\u" in text:
        kinds.append(([len(run.group()) for run in _ESCAPES.finditer(text)], "escapes"))
    for runs, what in kinds:
        if runs and max(runs) > MAX_ENCODED_RUN:
            return f"a run of {max(runs)} characters of {what}"
        if sum(runs) > MAX_ENCODED_SHARE * len(text):
            return f"{sum(runs) / len(text):.0%} {what}"
    return ""


def _runs(marks: bytes, least: int) -> list[tuple[int, int]]:
    """Where the runs of marked characters begin and end that have at least so many."""
    others = np.flatnonzero(np.frombuffer(marks, np.uint8) != ord("#"))
    begins, ends = np.append(0, others + 1), np.append(others, len(marks))
    chosen = ends - begins >= least
    return list(zip(begins[chosen].tolist(), ends[chosen].tolist(), strict=True))


def fingerprint(text: str) -> str:
    """SHA-256 (hex) of the text without regard to line ends, trailing blanks and blank lines at the end."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    # Most files have no trailing blanks, and to see that is ten times as fast as to look at every line.
    rare = not plain.isascii() or any(blank in plain for blank in _RARE_BLANKS)
    if rare or " \n" in plain or "\t\n" in plain:
        plain = "\n".join(line.rstrip() for line in plain.split("\n"))
    return hashlib.sha256(plain.rstrip().encode()).hexdigest()
