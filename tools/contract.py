"""The contract with its comments: protos/ as protoc reads them, each thing with what is written above it."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos"
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
"""Numbers of the fields of FileDescriptorProto, of which the places of comments are made."""
_FIELDS, _NESTED, _ONEOFS, _VALUES, _METHODS = 2, 3, 8, 2, 2


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message."""

    name: str
    number: int
    comment: str
    type: str
    """Full name of a message or an enum, else the scalar's (``int64``)."""
    is_scalar: bool
    label: str = ""
    """``optional``, ``repeated`` or nothing."""
    key: str = ""
    """Of a map: the scalar that its keys are; ``type`` is what its values are."""
    oneof: str = ""
    oneof_comment: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A message, or an enum (then its values stand where fields would, and only name, number and comment count)."""

    name: str
    """Full name."""
    comment: str
    is_enum: bool
    fields: list[Field]
    file: str
    """Path of its file below protos/."""
    source: str
    """The text of its definition, comments and all."""


@dataclass(frozen=True, slots=True)
class Method:
    """An RPC."""

    name: str
    comment: str
    request: str
    """Full name of the message."""
    response: str
    request_stream: bool
    response_stream: bool


@dataclass(frozen=True, slots=True)
class Service:
    """A gRPC service."""

    name: str
    """Full name."""
    comment: str
    methods: list[Method]


@dataclass(slots=True)
class Package:
    """One package (codegraft.trainer.v1) with what its files declare, in their order."""

    name: str
    services: list[Service] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def short(self) -> str:
        """``trainer`` of codegraft.trainer.v1."""
        return self.name.split(".")[1]


@cache
def packages() -> dict[str, Package]:
    """Every package of the contract by its name, sorted."""
    found: dict[str, Package] = {}
    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    for file in sorted(compiled(names).file, key=lambda file: (file.package, file.name)):
        package = found.setdefault(file.package, Package(file.package))
        reader = _Reader(file)
        package.services += reader.services()
        package.messages += reader.messages()
    return found


def messages() -> dict[str, Message]:
    """Every message and enum of the contract by its full name."""
    return {message.name: message for package in packages().values() for message in package.messages}


def compiled(names: Iterable[str], *folders: Path) -> FileDescriptorSet:
    """What protoc makes of these files, which lie in one of the folders or in protos/; with their comments.

    Raises:
        SystemExit: it finds something wrong, which it has said on stderr.
    """
    from grpc_tools import protoc

    places = [*folders, PROTOS, Path(str(importlib.resources.files("grpc_tools") / "_proto"))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "set.binpb")
        arguments = [f"--proto_path={place}" for place in places] + [
            "--include_source_info",
            f"--descriptor_set_out={out}",
        ]
        if protoc.main(["protoc", *arguments, *names]) != 0:
            raise SystemExit("protoc failed; its messages are above")
        return FileDescriptorSet.FromString(out.read_bytes())


class _Reader:
    """One file. A thing's place is the path of numbers that leads to it within the FileDescriptorProto."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._lines = (PROTOS / file.name).read_text(encoding="utf-8").splitlines()
        self._places = {tuple(place.path): place for place in file.source_code_info.location}

    def services(self) -> list[Service]:
        return [self._service(service, (_SERVICES, at)) for at, service in enumerate(self._file.service)]

    def messages(self) -> list[Message]:
        found = [
            (tuple(self._places[_MESSAGES, at].span), self._message(message, (_MESSAGES, at)))
            for at, message in enumerate(self._file.message_type)
        ] + [
            (tuple(self._places[_ENUMS, at].span), self._enum(enum, (_ENUMS, at)))
            for at, enum in enumerate(self._file.enum_type)
        ]
        return [message for _, message in sorted(found, key=lambda pair: pair[0])]

    def _comment(self, path: tuple[int, ...]) -> str:
        lines = self._places[path].leading_comments.splitlines()
        return "\n".join(line.removeprefix(" ").rstrip() for line in lines).strip()

    def _source(self, path: tuple[int, ...]) -> str:
        """The lines of a definition, with the comment that stands above it."""
        span = self._places[path].span
        first, last = span[0], span[2] if len(span) == 4 else span[0]
        above = len(self._places[path].leading_comments.splitlines())
        return "\n".join(self._lines[first - above : last + 1])

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> Service:
        methods = [
            Method(
                method.name,
                self._comment((*path, _METHODS, at)),
                method.input_type.lstrip("."),
                method.output_type.lstrip("."),
                method.client_streaming,
                method.server_streaming,
            )
            for at, method in enumerate(service.method)
        ]
        return Service(f"{self._file.package}.{service.name}", self._comment(path), methods)

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...]) -> Message:
        values = [
            Field(value.name, value.number, self._comment((*path, _VALUES, at)), "", True)
            for at, value in enumerate(enum.value)
        ]
        return Message(
            f"{self._file.package}.{enum.name}", self._comment(path), True, values, self._file.name, self._source(path)
        )

    def _message(self, message: DescriptorProto, path: tuple[int, ...]) -> Message:
        if strange := [nested.name for nested in message.nested_type if not nested.options.map_entry]:
            raise SystemExit(f"{message.name} has a message within it, {strange[0]}: give it a place of its own")
        maps = {f".{self._file.package}.{message.name}.{one.name}": one for one in message.nested_type}
        fields = list(self._fields(message, path, maps))
        return Message(
            f"{self._file.package}.{message.name}",
            self._comment(path),
            False,
            fields,
            self._file.name,
            self._source(path),
        )

    def _fields(
        self, message: DescriptorProto, path: tuple[int, ...], maps: dict[str, DescriptorProto]
    ) -> Iterator[Field]:
        for at, one in enumerate(message.field):
            about: dict[str, Any] = {
                "name": one.name,
                "number": one.number,
                "comment": self._comment((*path, _FIELDS, at)),
            }
            if entry := maps.get(one.type_name):
                key, value = entry.field
                yield Field(**about, **_type(value), key=_scalar(key))
                continue
            label = "repeated" if one.label == one.LABEL_REPEATED else "optional" if one.proto3_optional else ""
            oneof = comment = ""
            if one.HasField("oneof_index") and not one.proto3_optional:
                oneof = message.oneof_decl[one.oneof_index].name
                comment = self._comment((*path, _ONEOFS, one.oneof_index))
            yield Field(**about, **_type(one), label=label, oneof=oneof, oneof_comment=comment)


def _type(one: FieldDescriptorProto) -> dict[str, Any]:
    if one.type_name:
        return {"type": one.type_name.lstrip("."), "is_scalar": False}
    return {"type": _scalar(one), "is_scalar": True}


def _scalar(one: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(one.type).removeprefix("TYPE_").lower()
