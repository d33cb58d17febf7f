"""JSON that services keep in the object store, read as the records that it tells of."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from services.core import names
from services.core.errors import InvalidName

M = TypeVar("M", bound=Message)


def parsed(
    text: bytes, message_type: type[M], name: str, pattern: str, *, place: str, unreadable: list[str]
) -> M | None:
    """What a text says of the resource of that name; None when the name is not of the pattern, or the text is damaged.

    Args:
        pattern: of services/core/names.py.
        place: where the text lies; added to ``unreadable`` when it is damaged.
    """
    try:
        names.parse(pattern, name)
        return json_format.Parse(text, message_type(), ignore_unknown_fields=True)
    except InvalidName:
        return None
    except (json_format.ParseError, UnicodeDecodeError):
        unreadable.append(place)
        return None
