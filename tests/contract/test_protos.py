"""The contract documents itself: every RPC lists its errors, and every listed reason is in the error table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor

from services.core import errors
from tests.rpcs import METHODS, RULES

ROOT = Path(__file__).parents[2]
REASONS = {error.reason for error in errors.all_errors()}


def buf() -> str:
    found = shutil.which("buf", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert found, "buf is part of the dev extra"
    return found


def sources() -> descriptor_pb2.FileDescriptorSet:
    """Every proto file, with its comments."""
    image = subprocess.run([buf(), "build", "-o", "-#format=binpb"], cwd=ROOT, check=True, capture_output=True).stdout
    return descriptor_pb2.FileDescriptorSet.FromString(image)


FILES = sources().file


def rpcs() -> list[tuple[str, str]]:
    """(full RPC name, its leading comment) of every service, from the sources."""
    found = []
    for file in FILES:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for s, service in enumerate(file.service):
            for m, method in enumerate(service.method):
                found.append((f"{file.package}.{service.name}.{method.name}", comments.get((6, s, 2, m), "")))
    return found


RPCS = rpcs()
FOUR = ("ingest", "scanner", "trainer", "inference")


def test_all_four_services_are_in_the_contract() -> None:
    packages = {name.rsplit(".", 2)[0] for name, _ in RPCS}
    assert packages == {
        f"codegraft.{service}.v1" for service in ("ingest", "scanner", "trainer", "inference", "access")
    }


@pytest.mark.parametrize(("rpc", "comment"), RPCS, ids=[name for name, _ in RPCS])
def test_rpc_documents_its_errors(rpc: str, comment: str) -> None:
    listed = re.search(r"Errors: ([A-Z_,\s]+)\.", comment)
    assert listed, f"{rpc} has no line 'Errors: REASON, REASON.' in its comment"
    unknown = {reason for reason in re.split(r"[,\s]+", listed[1]) if reason} - REASONS
    assert not unknown, f"{rpc} names reasons that services/core/errors.py does not have: {unknown}"


def names_of_resources() -> set[tuple[str, str]]:
    """(message, field) of every string field whose comment says that it holds the name of something of a project."""
    found = set()
    for file in FILES:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for m, message in enumerate(file.message_type):
            for f, field in enumerate(message.field):
                if (
                    re.search(r"projects/\{?project", comments.get((4, m, 2, f), ""))
                    and field.type == field.TYPE_STRING
                ):
                    found.add((f"{file.package}.{message.name}", field.name))
    return found


RESOURCES = names_of_resources()
GIVEN_OUT = {"name", "source.name", "source.snapshot", "credential.name", "project.name"}
"""Fields of a resource that only answers have; creations ignore them, updates find the resource by the name."""


def named_fields(message: Descriptor, path: str = "", seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the fields of a request that hold names, in the messages within it, too."""
    for field in message.fields:
        inner = field.message_type
        if inner is not None and inner.full_name.startswith("codegraft.") and inner.full_name not in seen:
            yield from named_fields(inner, f"{path}{field.name}.", (*seen, inner.full_name))
        elif (message.full_name, field.name) in RESOURCES:
            yield path + field.name


@pytest.mark.parametrize("method", [method for method, rule in RULES.items() if rule.fields])
def test_the_policy_looks_at_every_name_in_a_request(method: str) -> None:
    """A new field that names something would otherwise be a way into other projects."""
    missing = set(named_fields(METHODS[method].input_type)) - set(RULES[method].fields)
    assert not missing - GIVEN_OUT


def test_names_are_found_by_their_comments() -> None:
    """What the test above stands on."""
    assert len(RESOURCES) > 60
    assert {
        ("codegraft.inference.v1.SetServingRequest", "checkpoint"),
        ("codegraft.ingest.v1.GitSource", "credential"),
    } <= (RESOURCES)
