"""docs/events.yaml, an AsyncAPI document of what goes over NATS: ``make docs``. Tests hold it against the code."""

from __future__ import annotations

import tomllib
from typing import Any

import yaml

from services.core.events import nats as events
from tools import contract, event_catalogue, inner_subjects
from tools.event_catalogue import FOLLOWERS, PACKAGE, Event

YAML = contract.ROOT / "docs" / "events.yaml"

_CLOUD_EVENT = "CloudEvents 1.0 in binary mode. Values are percent-encoded where they are not printable ASCII."
_HEADERS = {
    "ce-specversion": "Always 1.0.",
    "ce-id": "Names what happened: the same event has the same id, whoever publishes it and how often. Also sent as"
    " Nats-Msg-Id: the server drops a repetition within ten minutes.",
    "ce-type": "The event's type, which is also the subject.",
    "ce-source": "The service that publishes: codegraft/ingest, and so on.",
    "ce-subject": "The resource that it happened to.",
    "ce-time": "When, RFC 3339 in UTC.",
    "ce-datacontenttype": "Always application/protobuf.",
    "ce-dataschema": "Full name of the payload's message.",
    "ce-requestid": "x-request-id of the call that led to it; absent when no call did.",
    "ce-traceparent": "W3C trace context; absent outside of a trace.",
    "Nats-Msg-Id": "The same as ce-id.",
}
_OPTIONAL = ("ce-requestid", "ce-traceparent")


def document() -> dict[str, Any]:
    """The AsyncAPI document."""
    found = event_catalogue.catalogue()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Codegraft over NATS",
            "version": _version(),
            "description": "What the services publish, queue and keep at NATS JetStream; docs/events.md explains it."
            " Events are for everybody; jobs, audit and state are the services' own and may change without notice.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/protobuf",
        "servers": {
            "nats": {
                "host": "{host}",
                "protocol": "nats",
                "description": "CODEGRAFT_NATS_URL. Each service is a user of its own (docs/security.md).",
                "variables": {"host": {"default": "localhost:4222"}},
                "security": [{"$ref": "#/components/securitySchemes/password"}],
            }
        },
        "channels": {**{event.type: _event_channel(event) for event in found}, **inner_subjects.channels()},
        "operations": {**_event_operations(found), **inner_subjects.operations()},
        "components": {
            "securitySchemes": {"password": {"type": "userPassword", "description": "NATS user and password."}},
            "schemas": {"CloudEvent": _cloud_event()},
            "messages": {**{event.short: _event_message(event) for event in found}, **inner_subjects.messages()},
        },
        "x-jetstream-streams": inner_subjects.streams(),
    }


# --- events -------------------------------------------------------------------------------------------------------


def _event_channel(event: Event) -> dict[str, Any]:
    return {
        "address": event.type,
        "description": event.meaning,
        "messages": {event.short: {"$ref": f"#/components/messages/{event.short}"}},
        "x-jetstream-stream": events.STREAM,
    }


def _event_operations(found: list[Event]) -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for event in found:
        operations[f"{event.publisher}.publishes.{event.short}"] = {
            "action": "send",
            "channel": inner_subjects.channel(event.type),
            "description": event.meaning,
            "tags": [{"name": event.publisher}],
        }
        for follower, what in FOLLOWERS.get(event.type, {}).items():
            operations[f"{follower}.follows.{event.short}"] = {
                "action": "receive",
                "channel": inner_subjects.channel(event.type),
                "description": what,
                "tags": [{"name": follower}],
            }
    return operations


def _event_message(event: Event) -> dict[str, Any]:
    about = {
        "ce-type": {"const": event.type},
        "ce-source": {"const": f"codegraft/{event.publisher}"},
        "ce-dataschema": {"const": event.message},
        "ce-subject": {"pattern": event.subject_pattern, "description": event.subject},
        "ce-id": {"pattern": event.id_pattern, "description": " or ".join(event.ids)},
    }
    return {
        "name": event.message,
        "title": event.short,
        "summary": event.meaning,
        "contentType": "application/protobuf",
        "headers": {"allOf": [{"$ref": "#/components/schemas/CloudEvent"}, {"type": "object", "properties": about}]},
        "payload": {"schemaFormat": "application/vnd.google.protobuf;version=3", "schema": _proto(event.message)},
    }


def _cloud_event() -> dict[str, Any]:
    return {
        "type": "object",
        "description": _CLOUD_EVENT,
        "required": [name for name in _HEADERS if name not in _OPTIONAL],
        "properties": {name: {"type": "string", "description": text} for name, text in _HEADERS.items()},
    }


def _proto(name: str) -> str:
    """A proto file of its own with the message, and with those of its package that its fields have."""
    known, wanted, imports = contract.messages(), [name], []
    for one in wanted:
        for each in (each for each in known[one].fields if not each.is_scalar and each.type not in wanted):
            if each.type.startswith(f"{PACKAGE}."):
                wanted.append(each.type)
            else:
                imports.append(f'import "{known[each.type].file}";')
    head = ['syntax = "proto3";', f"package {PACKAGE};", *sorted(set(imports))]
    return "\n\n".join(["\n".join(head), *(known[one].source for one in wanted)]) + "\n"


def _version() -> str:
    project = tomllib.loads((contract.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def text() -> str:
    """docs/events.yaml."""
    dumped: str = yaml.dump(document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "# Made by: make docs. The source is tools/asyncapi.py.\n" + dumped


if __name__ == "__main__":
    YAML.write_text(text(), encoding="utf-8")
    event_catalogue.PAGE.write_text(event_catalogue.page(), encoding="utf-8")
