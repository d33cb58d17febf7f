"""Keys and the audit log on the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from codegraft.access.v1 import access_pb2, audit_pb2
from codegraft.ingest.v1.project_pb2 import Project
from services.core import errors
from services.core.audit.record import Change, fill


@pytest.fixture
def keys(fake: Any) -> list[access_pb2.Key]:
    valid = access_pb2.Key(name="keys/ci", role=access_pb2.ROLE_CONTRIBUTOR, projects=["projects/acme"], title="CI")
    expired = access_pb2.Key(name="keys/old", role=access_pb2.ROLE_READER, all_projects=True)
    expired.expire_time.FromDatetime(datetime(2020, 1, 2, 3, 4, tzinfo=UTC))
    revoked = access_pb2.Key(name="keys/gone", role=access_pb2.ROLE_OPERATOR, projects=["projects/a", "projects/b"])
    revoked.revoke_time.GetCurrentTime()
    fake.answers |= {
        "CreateKey": access_pb2.CreateKeyResponse(key=valid, secret="cg_ci_hush"),
        "RotateKey": access_pb2.RotateKeyResponse(key=valid, secret="cg_ci_new"),
        "RevokeKey": access_pb2.RevokeKeyResponse(key=revoked),
        "ListKeys": access_pb2.ListKeysResponse(keys=[valid, expired, revoked]),
    }
    return [valid, expired, revoked]


def test_a_key_is_made_and_its_secret_goes_to_standard_output_alone(fake: Any, keys: Any, codegraft: Any) -> None:
    done = codegraft("key", "create", "ci", "--role", "contributor", "-p", "acme", "-p", "b", "--expires", "90d")
    assert done.code == 0 and done.out == "cg_ci_hush\n" and "hush" not in done.err
    request = fake.last("CreateKey")
    assert (request.key_id, request.key.role) == ("ci", access_pb2.ROLE_CONTRIBUTOR)
    assert list(request.key.projects) == ["projects/acme", "projects/b"]
    left = request.key.expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=89) < left < timedelta(days=90) and request.request_id
    made = json.loads(codegraft("key", "create", "ci", "--role", "reader", "--all-projects", "--json").out)
    assert made["secret"] == "cg_ci_hush" and made["key"]["name"] == "keys/ci"
    assert fake.last("CreateKey").key.all_projects and not fake.last("CreateKey").key.HasField("expire_time")


def test_keys_are_listed_rotated_and_revoked(fake: Any, keys: Any, codegraft: Any) -> None:
    lines = codegraft("key", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["KEY", "ci", "old", "gone"]
    assert "valid" in lines[1] and "expired 2020-01-02 03:04" in lines[2] and "revoked" in lines[3]
    assert [each["name"] for each in json.loads(codegraft("key", "list", "--json").out)] == [key.name for key in keys]
    assert codegraft("key", "rotate", "ci", "--overlap", "2h").out == "cg_ci_new\n"
    assert fake.last("RotateKey").overlap.ToTimedelta() == timedelta(hours=2)
    assert "revoked keys/gone" in codegraft("key", "revoke", "gone").err
    assert fake.last("RevokeKey").name == "keys/gone"


def test_a_duration_that_is_none_is_told(codegraft: Any) -> None:
    for wrong in ("90", "d", "1w", "-1d", "1.5h"):
        done = codegraft("key", "create", "ci", "--role", "reader", "-p", "a", f"--expires={wrong}")
        assert done.code == 2 and "90d, 12h or 30m" in done.err


def test_who_calls_is_shown(fake: Any, codegraft: Any) -> None:
    fake.answers["GetCaller"] = access_pb2.GetCallerResponse(
        subject="keys/ci", role=access_pb2.ROLE_READER, projects=["projects/acme"]
    )
    assert codegraft("key", "whoami").err == "keys/ci: reader in acme\n"
    assert json.loads(codegraft("key", "whoami", "--json").out)["role"] == "ROLE_READER"


def test_who_may_not_gets_an_exit_code_of_its_own(fake: Any, codegraft: Any) -> None:
    for error in (errors.Unauthenticated("who?"), errors.PermissionDenied("no"), errors.KeyRevoked("gone")):
        fake.answers["ListKeys"] = error
        assert codegraft("key", "list").code == 6


def test_the_audit_log_is_shown(fake: Any, codegraft: Any) -> None:
    record = audit_pb2.AuditRecord(
        method="/codegraft.ingest.v1.ProjectService/UpdateProject",
        caller="keys/ci",
        resources=["projects/acme"],
        code="OK",
    )
    record.time.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    fill(record, [Change("projects/acme", Project(title="one", etag="1"), Project(title="two", etag="1"))])
    fake.answers["ListAuditRecords"] = audit_pb2.ListAuditRecordsResponse(records=[record, record])
    lines = codegraft("audit", "-p", "acme", "--since", "2d").out.splitlines()
    assert lines[1].split() == ["2026-01-02", "03:04:05", "keys/ci", "UpdateProject", "projects/acme", "OK"]
    assert fake.last("ListAuditRecords").parent == "projects/acme"
    since = datetime.now(UTC) - fake.last("ListAuditRecords").start_time.ToDatetime(UTC)
    assert timedelta(days=2) <= since < timedelta(days=2, minutes=5)
    assert "    projects/acme title: one -> two" in codegraft("audit", "--changes").out.splitlines()
    assert fake.last("ListAuditRecords").parent == "projects/-"
    printed = [json.loads(line) for line in codegraft("audit", "--limit", "1", "--json").out.splitlines()]
    assert [each["changes"][0]["after"]["title"] for each in printed] == ["two"]
