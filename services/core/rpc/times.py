"""Times in requests: protobuf takes any numbers, of which most are no time, and no calendar could hold them."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from services.core.errors import InvalidArgument

_FIRST, _LAST = -62_135_596_800, 253_402_300_799
"""Seconds since 1970 of the years 1 and 9999."""
_LONGEST = 315_576_000_000
"""Seconds of 10,000 years."""
_SECOND = 1_000_000_000
"""In nanoseconds."""


def check(message: object, path: str = "") -> None:
    """Returns when all times in a request are such as google.protobuf.Timestamp and Duration describe.

    Args:
        message: what is no protobuf message has none.
        path: of the message in the request, with a dot at the end.

    Raises:
        InvalidArgument: one is not; names the field.
    """
    if not isinstance(message, Message):
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            if not _is_possible(each):
                raise InvalidArgument(
                    f"{path}{field.name} is no {field.message_type.name}",
                    field=path + field.name,
                    hint="Give years from 1 to 9999, at most 10,000 years, and nanos below a second.",
                )
            check(each, f"{path}{field.name}.")


def _is_possible(message: Message) -> bool:
    match message:
        case Timestamp():
            return _FIRST <= message.seconds <= _LAST and 0 <= message.nanos < _SECOND
        case Duration():
            same_sign = message.seconds * message.nanos >= 0
            return same_sign and abs(message.seconds) <= _LONGEST and abs(message.nanos) < _SECOND
        case _:
            return True
