"""docs/events.yaml: a sound AsyncAPI document, and what the services really publish, follow and may."""

from __future__ import annotations

import ast
import gzip
import importlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from google.protobuf import descriptor_pool

from services.cli.local import permissions
from services.core.events.bus import PREFIX
from tools import asyncapi, contract, event_catalogue, inner_subjects

SCHEMA = Path(__file__).with_name("asyncapi_3.0.0.json.gz")
SERVICES = contract.ROOT / "services"
DOCUMENT: dict[str, Any] = yaml.safe_load(asyncapi.YAML.read_text(encoding="utf-8"))
EVENTS = {event.type: event for event in event_catalogue.catalogue()}


def test_the_document_and_the_table_are_up_to_date() -> None:
    assert asyncapi.YAML.read_text(encoding="utf-8") == asyncapi.text(), "the events have changed: make docs"
    assert event_catalogue.PAGE.read_text(encoding="utf-8") == event_catalogue.page(), (
        "the events have changed: make docs"
    )


def test_the_document_is_asyncapi() -> None:
    validator = jsonschema.Draft7Validator(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    assert not [f"{list(error.absolute_path)}: {error.message}"[:500] for error in validator.iter_errors(DOCUMENT)]
    assert list(validator.iter_errors(DOCUMENT | {"operations": {"x": {"action": "shout"}}})), (
        "the schema finds nothing"
    )


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for each in part.values():
            yield from references(each)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def test_references_lead_somewhere() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 30
    for reference in found:
        place = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


# --- against the code ---------------------------------------------------------------------------------------------


@cache
def trees() -> dict[str, list[ast.Module]]:
    """The source of each service, and of core, parsed."""
    found = defaultdict(list)
    for service in [*permissions.SERVICES, "core"]:
        for path in (SERVICES / service).rglob("*.py"):
            found[service].append(ast.parse(path.read_text(encoding="utf-8")))
    return found


def is_event(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(PREFIX)
        and node.value.endswith(".v1")
        and node.value.count(".") == 4
    )


def events_of(service: str) -> set[str]:
    return {node.value for tree in trees()[service] for node in ast.walk(tree) if is_event(node)}  # type: ignore[attr-defined]


def followed_by(service: str) -> set[str]:
    """What it subscribes to: names of constants, in the file in which they stand."""
    found = set()
    for tree in trees()[service]:
        constants = {
            target.id: node.value.value  # type: ignore[attr-defined]
            for node in tree.body
            if isinstance(node, ast.Assign) and is_event(node.value)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "subscribe":
                for argument in node.args:
                    assert isinstance(argument, ast.Name), ast.unparse(node)
                    found.add(constants[argument.id])
    return found


@pytest.mark.parametrize("service", permissions.SERVICES)
def test_a_service_publishes_and_follows_what_the_catalogue_says(service: str) -> None:
    published = {event.type for event in EVENTS.values() if event.publisher == service}
    followed = {type for type, who in event_catalogue.FOLLOWERS.items() if service in who}
    assert followed_by(service) == followed
    assert events_of(service) == published | followed


def test_a_bucket_holds_what_the_catalogue_says() -> None:
    """By the tables that services make over it, core those of the keys' bucket; runs' stories and places have none."""
    for service in permissions.SERVICES:
        there = permissions.SERVICES[service]
        made = {
            node.args[1].id
            for tree in trees()[service] + (trees()["core"] if there.writes_keys else [])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Table" and len(node.args) == 2
            if isinstance(node.args[1], ast.Name)
        }
        buckets = [service, *there.buckets, *(["access"] if there.writes_keys else [])]
        told = {name.rpartition(".")[2] for bucket in buckets for name in inner_subjects.RECORDS[bucket]}
        assert made == told - {"RunEvent", "StoredPlaces"}, service


def allows(patterns: list[str], subject: str) -> bool:
    """Whether NATS lets a subject pass; a placeholder in it is any word."""

    def fits(pattern: list[str], words: list[str]) -> bool:
        if not pattern or not words:
            return pattern == words
        if pattern[0] == ">":
            return True
        return (pattern[0] == "*" or pattern[0] == words[0]) and fits(pattern[1:], words[1:])

    return any(fits(pattern.split("."), subject.split(".")) for pattern in patterns)


@pytest.mark.parametrize("name", DOCUMENT["operations"])
def test_nats_permits_the_operations_to_their_service_alone(name: str) -> None:
    operation = DOCUMENT["operations"][name]
    service, channel = operation["tags"][0]["name"], DOCUMENT["channels"][operation["channel"]["$ref"].split("/")[2]]
    kinds = permissions.SERVICES[service].jobs
    addresses = [channel["address"].replace("{kind}", kind).replace("{service}", service) for kind in kinds or [""]]
    stream = channel.get("x-jetstream-stream")
    for address in addresses:
        if operation["action"] == "send":
            assert allows(permissions.publish(service), address)
            others = permissions.SERVICES.keys() - {service}
            assert not [other for other in others if allows(permissions.publish(other), address)]
        elif stream is None:
            assert allows(permissions.subscribe(service), address)
        else:
            ways = [f"$JS.API.CONSUMER.CREATE.{stream}", *(f"$JS.ACK.{stream}.workers-{kind}.1" for kind in kinds)]
            assert any(allows(permissions.publish(service), way) for way in ways)


def test_payloads_are_the_messages_of_the_contract(tmp_path: Path) -> None:
    """What stands in the document is a proto file from which the same message comes."""
    importlib.import_module("codegraft.event.v1.events_pb2")
    names = []
    for event in EVENTS.values():
        payload = DOCUMENT["components"]["messages"][event.short]["payload"]
        assert payload["schemaFormat"] == "application/vnd.google.protobuf;version=3"
        names.append(f"{event.short}.proto")
        (tmp_path / names[-1]).write_text(payload["schema"].replace("package codegraft.", f"package {event.short}."))
    for file in contract.compiled(names, tmp_path).file:
        made = next(message for message in file.message_type if message.name == file.name.removesuffix(".proto"))
        real = descriptor_pool.Default().FindMessageTypeByName(f"codegraft.event.v1.{made.name}")
        assert [(field.name, field.number, field.type) for field in made.field] == [
            (field.name, field.number, field.type) for field in real.fields
        ]
