"""What the reasons of verdicts mean, for people who look at one file."""

from __future__ import annotations

from codegraft.scanner.v1 import verdict_pb2 as pb
from codegraft.scanner.v1.verdict_pb2 import VerdictReason

_MEANINGS = {
    pb.VERDICT_REASON_ACCEPTED: "It is in the dataset.",
    pb.VERDICT_REASON_LINGUIST_ERROR: "Its bytes could not be read or decoded.",
    pb.VERDICT_REASON_NOT_TEXT: "It is binary: there is no text to learn from.",
    pb.VERDICT_REASON_NOT_CODE: "Its language is no programming language, or none that is known.",
    pb.VERDICT_REASON_TOO_LARGE: "It is over the size limit, as files are that programs write.",
    pb.VERDICT_REASON_GENERATED: "A program wrote it, by linguist's rules: what it is made from teaches more.",
    pb.VERDICT_REASON_VENDORED: "It is other people's code, by linguist's rules.",
    pb.VERDICT_REASON_EXCLUDED_BY_MASK: "A mask leaves it out, or there are masks to take and none takes it.",
    pb.VERDICT_REASON_LANGUAGE_OFF: "Its language is switched off for the project or the scan.",
    pb.VERDICT_REASON_LOTS_OF_DIGITS: "So many of its characters are digits that it is data rather than code.",
    pb.VERDICT_REASON_LONG_LINES: "Its lines are too long for code that people write.",
    pb.VERDICT_REASON_ENCODED_DATA: "Most of it is encoded data, such as base64 or hexadecimal.",
    pb.VERDICT_REASON_DUPLICATE: "Another file has the same or nearly the same text, and one of them is enough.",
    pb.VERDICT_REASON_SECRET: "It seems to hold a secret, which a model could tell later.",
    pb.VERDICT_REASON_FILTER_EMPTY: "It has too few tokens for a loss that says anything.",
    pb.VERDICT_REASON_HIGH_LOSS: "The base model predicts it so badly that it is hardly code.",
    pb.VERDICT_REASON_LICENSE: "It names a licence that the project or the scan leaves out.",
}


def meaning(reason: VerdictReason) -> str:
    """One sentence; empty for a reason that is newer than this gateway."""
    return _MEANINGS.get(reason, "")
