"""Settings of a job as fields of a form: each empty, which is the service's choice, or a value within its range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from services.core.errors import InvalidArgument
from services.gateway.console.forms import Form

Kind = Literal["whole", "number", "switch", "choice", "text", "names", "lines"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One field. Its range is told to people only; the service is who refuses."""

    name: str
    label: str
    range: str
    hint: str
    kind: Kind
    options: tuple[str, ...] = ()
    """Of a choice."""


class Settings:
    """The fields of one message, for :class:`Setting`."""

    def __init__(self, message: type[Message]) -> None:
        self._fields = message.DESCRIPTOR.fields_by_name

    def __call__(self, name: str, label: str, range: str = "", hint: str = "", *, lines: bool = False) -> Setting:
        """One of them.

        Args:
            lines: of a list: one a line, rather than separated by blanks.
        """
        field = self._fields[name]
        if field.is_repeated:
            return Setting(name, label, range, hint, "lines" if lines else "names")
        if field.enum_type is not None:
            names = tuple(value.name for value in field.enum_type.values[1:])
            return Setting(name, label, range, hint, "choice", names)
        kinds: dict[int, Kind] = {
            FieldDescriptor.TYPE_BOOL: "switch",
            FieldDescriptor.TYPE_DOUBLE: "number",
            FieldDescriptor.TYPE_STRING: "text",
        }
        return Setting(name, label, range, hint, kinds.get(field.type, "whole"))


def read(message: Message, settings: Sequence[Setting], form: Form) -> None:
    """Puts what the form says into the message; fields that are empty stay unset.

    Raises:
        InvalidArgument: a field holds no such value; names it.
    """
    for setting in settings:
        given = form.text(setting.name)
        if not given:
            continue
        try:
            match setting.kind:
                case "lines":
                    getattr(message, setting.name).extend(form.lines(setting.name))
                case "names":
                    getattr(message, setting.name).extend(given.replace(",", " ").split())
                case "switch":
                    setattr(message, setting.name, given == "on")
                case "choice" | "text":
                    setattr(message, setting.name, given)
                case "number":
                    setattr(message, setting.name, form.number(setting.name))
                case "whole":
                    setattr(message, setting.name, form.whole(setting.name))
        except ValueError:  # more than the field has bits, or no such word
            raise InvalidArgument(
                f"{setting.name} cannot be {given[:40]!r}",
                field=setting.name,
                hint=f"Use {setting.range or 'another'}.",
            ) from None
