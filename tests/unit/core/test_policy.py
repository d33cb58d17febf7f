"""The policy: every RPC has a rule, and a caller of one project gets nothing of another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from services.core.auth import policy
from services.core.auth.caller import Caller, Role
from services.core.auth.policy import Rule
from services.core.errors import PermissionDenied
from tests.rpcs import METHODS, NAMED, RULES, named, request

MINE, OTHER = "projects/mine", "projects/other"
BELOW = ["", "/sources/s", "/snapshots/latest", "/datasets/0a", "/runs/r", "/runs/r/checkpoints/best", "/scans/s"]


def caller(role: Role = Role.OPERATOR, *projects: str) -> Caller:
    return Caller("keys/k", role, frozenset(projects or [MINE]))


def test_every_rpc_has_a_rule_and_every_rule_an_rpc() -> None:
    assert len(METHODS) > 60
    assert set(RULES) == set(METHODS)


def test_without_a_rule_nobody_may_call() -> None:
    everybody = Caller("keys/k", Role.OPERATOR, None)
    for method in ("/codegraft.ingest.v1.ProjectService/New", "/codegraft.new.v1.New/Get", "/x", ""):
        with pytest.raises(PermissionDenied, match="nobody may"):
            policy.check(everybody, method, object())


def test_the_public_ones_are_those_of_health() -> None:
    assert {method for method, rule in RULES.items() if rule.role is None} == {
        f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch")
    }


def test_who_needs_no_name_is_known_one_by_one() -> None:
    """A new RPC without a name in its rule has to be thought about here, and tested where it is served."""
    assert {method.rpartition("/")[2] for method, rule in RULES.items() if rule.handler} == {
        "CreateKey", "ListKeys", "RotateKey", "RevokeKey", "GetCaller", "GetQuota", "SetQuota", "GetUsage",
        "ListProjects",
    }  # fmt: skip
    assert {method.rpartition("/")[2] for method, rule in RULES.items() if rule.all_projects} == {
        "CollectGarbage", "PushModel", "ListAdapters", "ListWorkers",
    }  # fmt: skip
    shared = {method for method, rule in RULES.items() if rule.role and rule == policy.shared(rule.role)}
    assert {method.rpartition("/")[2] for method in shared} == {"ListModels", "GetModel", "ServerReflectionInfo"}


@pytest.mark.parametrize("method", NAMED)
def test_names_of_another_project_are_denied_field_by_field(method: str) -> None:
    rule = NAMED[method]
    first = named(method, MINE, rule.fields[0], "/runs/r")
    policy.check(caller(), method, request(method, first))
    for path in rule.fields:
        for below in BELOW:
            with pytest.raises(PermissionDenied) as denied:
                policy.check(caller(), method, request(method, first | named(method, OTHER, path, below)))
            assert denied.value.field == path.removeprefix("projects/{").removesuffix("}")
            assert denied.value.metadata["project"].startswith(OTHER)
        mine = request(method, first | named(method, MINE, path, "/runs/r"))
        policy.check(caller(), method, mine)
        policy.check(Caller("keys/k", Role.OPERATOR, None), method, request(method, named(method, OTHER, path)))


CROOKED = [
    "", "projects", "projects/", "mine", "/projects/mine", "projects/mine/../other", "projects/mine/../../projects/o",
    "projects/mine/", "projects//mine", "projects/mine\n", "projects/mine/runs/.", "PROJECTS/mine", "projects/mineral",
]  # fmt: skip


@pytest.mark.parametrize("method", NAMED)
def test_a_crooked_name_is_nobodys(method: str) -> None:
    path = NAMED[method].fields[0]
    for name in CROOKED if not path.startswith("projects/{") else ():
        with pytest.raises(PermissionDenied):
            policy.check(caller(), method, request(method, {path: name}))


@pytest.mark.parametrize("method", RULES)
def test_roles_include_those_before_them(method: str) -> None:
    rule = RULES[method]
    asked = request(method, named(method, MINE, rule.fields[0]) if rule.fields else {})
    for role in Role:
        one = Caller("keys/k", role, None)
        if rule.role is None or role >= rule.role:
            policy.check(one, method, asked)
        else:
            with pytest.raises(PermissionDenied) as denied:
                policy.check(one, method, asked)
            assert denied.value.metadata["role"] == rule.role.name.lower()


@pytest.mark.parametrize("method", [method for method, rule in RULES.items() if rule.all_projects])
def test_what_is_of_all_projects_is_not_for_callers_of_some(method: str) -> None:
    with pytest.raises(PermissionDenied, match="all projects"):
        policy.check(caller(), method, request(method, {}))


def test_several_projects_and_none() -> None:
    method = "/codegraft.ingest.v1.SnapshotService/DiffSnapshots"
    across = request(method, {"base": f"{MINE}/snapshots/a", "target": f"{OTHER}/snapshots/b"})
    policy.check(caller(Role.READER, MINE, OTHER), method, across)
    with pytest.raises(PermissionDenied):
        policy.check(Caller("keys/k", Role.OPERATOR, frozenset()), method, across)


def strings(message: Any, path: str = "", seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the string fields of a message and those in it."""
    for field in message.fields:
        inner = field.message_type
        if inner is not None and inner.full_name.startswith("codegraft.") and inner.full_name not in seen:
            yield from strings(inner, f"{path}{field.name}.", (*seen, inner.full_name))
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield path + field.name


@pytest.mark.parametrize("method", NAMED)
def test_the_fields_of_a_rule_are_there(method: str) -> None:
    there = set(strings(METHODS[method].input_type))
    assert {path.removeprefix("projects/{").removesuffix("}") for path in NAMED[method].fields} <= there


def test_a_rule_compares_by_what_it_says() -> None:
    assert policy.named(Role.READER, "name") == Rule(Role.READER, ("name",)) != policy.own(Role.READER)
