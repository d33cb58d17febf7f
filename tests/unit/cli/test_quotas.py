"""Quotas on the command line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from codegraft.access.v1 import quota_pb2 as pb
from codegraft.ingest.v1.project_pb2 import GetProjectResponse, Project
from services.core import errors


@pytest.fixture
def quotas(fake: Any) -> None:
    there = pb.Quota(name="projects/acme/quota", etag="7", limits=pb.Limits(runs=2, scans=-1, storage_bytes=500))
    used = pb.Limits(storage_bytes=123456, runs=1, requests_per_minute=3)
    stored = pb.StorageUsage(sources=120000, adapters=3000, training_states=456)
    counts = pb.Limits(runs=2, storage_bytes=500, requests_per_minute=6000)

    def store(request: pb.SetQuotaRequest) -> pb.SetQuotaResponse:
        return pb.SetQuotaResponse(quota=request.quota, effective=counts)

    fake.answers |= {
        "GetQuota": pb.GetQuotaResponse(quota=there, effective=counts),
        "GetUsage": pb.GetUsageResponse(used=used, storage=stored),
        "SetQuota": store,
    }


def test_what_may_be_used_stands_beside_what_is(fake: Any, quotas: None, codegraft: Any) -> None:
    lines = codegraft("quota", "show", "-p", "acme").out.splitlines()
    rows = {words[0]: words[1:] for words in (re.split(r"\s{2,}", line.strip()) for line in lines[1:])}
    assert rows["requests a minute"] == ["6,000", "3", "default"]
    assert rows["bytes of storage"] == ["500", "123,456", "500"] and rows["runs at once"] == ["2", "1", "2"]
    assert rows["of sources"][1] == "120,000" and rows["of training states"][1] == "456" and "of uploads" not in rows
    assert rows["scans at once"] == ["no limit", "-", "none"]
    assert fake.last("GetQuota").name == fake.last("GetUsage").name == "projects/acme/quota"
    told = json.loads(codegraft("quota", "show", "-k", "keys/ci", "--json").out)
    assert told["effective"]["runs"] == "2" and told["used"]["storage_bytes"] == "123456"
    assert told["quota"]["etag"] == "7" and told["storage"]["adapters"] == "3000"
    assert fake.last("GetQuota").name == "keys/ci/quota"
    fake.answers["GetUsage"] = errors.PermissionDenied("of another project")
    done = codegraft("quota", "show", "-p", "acme")
    assert done.code == 0 and "of another project" in done.err


def test_a_project_shows_what_it_has_stored(fake: Any, quotas: None, codegraft: Any) -> None:
    fake.answers["GetProject"] = GetProjectResponse(project=Project(name="projects/acme", title="Acme"))
    told = codegraft("project", "show", "acme").out
    assert "123,456 of 500 (sources 120,000, adapters 3,000, training states 456)" in told
    fake.answers["GetUsage"] = errors.PermissionDenied("not of it")
    done = codegraft("project", "show", "acme")
    assert done.code == 0 and "Acme" in done.out and "not of it" in done.err


def test_what_is_not_named_stays_as_it_is(fake: Any, quotas: None, codegraft: Any) -> None:
    done = codegraft("quota", "set", "-p", "acme", "--tokens", "200000", "--storage", "20G", "--runs", "default")
    assert done.code == 0 and "projects/acme" in done.err and "6,000 requests a minute" in done.err
    asked = fake.last("SetQuota").quota
    assert asked.limits == pb.Limits(tokens_per_minute=200_000, storage_bytes=20 * 10**9, scans=-1)
    assert (asked.name, asked.etag) == ("projects/acme/quota", "7"), "of two operators at once the second one is told"
    codegraft("quota", "set", "-k", "ci", "--requests", "none", "--scans", "0", "--json")
    assert fake.last("SetQuota").quota.limits == pb.Limits(
        requests_per_minute=-1, scans=0, runs=2, storage_bytes=500
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set", "--runs", "2"], "--project and --key"),
        (["set", "-p", "a", "-k", "b", "--runs", "2"], "--project and --key"),
        (["set", "-p", "a"], "--tokens"),
        (["set", "-p", "a", "--runs", "many"], "--runs 'many'"),
        (["set", "-p", "a", "--runs", "-2"], "--runs"),
        (["set", "-p", "a", "--runs", "2G"], "--runs '2G'"),
        (["set", "-p", "a", "--storage", "1.5G"], "--storage '1.5G'"),
        (["show"], "--project and --key"),
    ],
)
def test_mistakes_are_told(quotas: None, codegraft: Any, arguments: list[str], said: str) -> None:
    done = codegraft("quota", *arguments)
    assert done.code == 2 and said in done.err
