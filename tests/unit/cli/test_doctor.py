"""How the doctor judges what it found; what it finds on a real installation is in tests/contract/test_doctor.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, NoncurrentVersionExpiration, Rule
from nats.js import api

from services.cli.doctor import clock, gateway, services, store, streams
from services.cli.doctor.check import Result
from services.cli.doctor.services import Told


@pytest.mark.parametrize(
    ("at", "resolution", "expected"),
    [
        (100.5, 0, 0),  # between question and answer
        (103, 0, 2),
        (97, 0, -3),
        (99, 1.0, 0),  # a Date cuts the second off
        (96, 1.0, -3),
    ],
)
def test_skew_counts_only_what_cannot_be_the_way(at: float, resolution: float, expected: float) -> None:
    assert clock.skew(at, 100, 101, resolution) == expected


@pytest.mark.parametrize(("seconds", "result"), [(0.9, Result.OK), (-2, Result.WARNING), (-40, Result.FAILED)])
def test_clocks_that_differ_are_told(seconds: float, result: Result) -> None:
    found = clock.judge("trainer", seconds)
    assert found.result is result and bool(found.hint) is (result is not Result.OK)
    told = Told(time=100.0 + seconds, before=100.0, after=100.0)
    assert clock.check_services({"trainer": told, "silent": Told("unreachable")}) == [found]


@pytest.mark.parametrize(
    ("versions", "results"),
    [
        (["0.4.0", "0.4.0"], [Result.OK]),
        (["0.4.1", "0.5.0"], [Result.WARNING]),
        (["0.3.0", "0.5.0"], [Result.FAILED]),
        (["0.5.0", "1.0.0"], [Result.FAILED, Result.WARNING]),
        (["one before 0.1.0", "0.4.0"], [Result.FAILED, Result.WARNING]),
        (["0.2.0", "0.2.0"], [Result.OK, Result.WARNING]),
    ],
)
def test_releases_go_together_within_one_minor_version(versions: list[str], results: list[Result]) -> None:
    found = services.judge({f"s{number}": version for number, version in enumerate(versions)}, mine="0.4.0")
    assert [check.result for check in found] == results
    assert all(check.hint for check in found if check.result is not Result.OK)


CONFIG = streams.wanted(3)[0]


def info(cluster: api.ClusterInfo | None = None, **changes: object) -> api.StreamInfo:
    config = CONFIG.evolve(**changes)
    return api.StreamInfo(config=config, state=api.StreamState(1, 1, 1, 1, 1), cluster=cluster)


@pytest.mark.parametrize(
    ("found", "result", "says"),
    [
        (info(), Result.OK, "3 copies"),
        (info(num_replicas=1), Result.FAILED, "--replicas 3"),
        (info(storage=api.StorageType.MEMORY), Result.FAILED, "storage file"),
        (info(subjects=["$KV.other.>"]), Result.FAILED, "$KV.inference.>"),
        (info(max_msgs_per_subject=64), Result.FAILED, "max_msgs_per_subject 1"),
        (info(api.ClusterInfo(leader=None)), Result.FAILED, "two of three"),
        (info(api.ClusterInfo(leader="a", replicas=[api.PeerInfo("b", current=False)])), Result.WARNING, "servers"),
    ],
)
def test_a_stream_is_as_it_is_made(found: api.StreamInfo, result: Result, says: str) -> None:
    check = streams.judge(CONFIG, found)
    assert check.result is result and says in check.found + check.hint


def test_every_stream_is_known() -> None:
    names = {config.name for config in streams.wanted(1)}
    buckets = {"KV_ingest", "KV_scanner", "KV_trainer", "KV_inference", "KV_completions", "KV_access"}
    assert names == buckets | {"EVENTS", "AUDIT", "JOBS", "JOBS_DEAD"}


def test_one_server_syncs_always_or_writes_can_be_lost() -> None:
    assert streams.judge_sync({"sync_always": True, "sync_interval": 120e9}, 1).result is Result.OK
    late = streams.judge_sync({"sync_interval": 120e9}, 1)
    assert late.result is Result.FAILED and "120 s" in late.found and "sync_interval: always" in late.hint
    assert streams.judge_sync({"sync_interval": 120e9}, 3).result is Result.OK


def test_a_stream_whose_disk_ran_full_is_told() -> None:
    assert streams.judge_health(200, b'{"status":"ok"}').result is Result.OK
    said = (
        b"""{"status":"unavailable","error":"JetStream stream '$G > KV_ingest' write error: no space left on device"}"""
    )
    stuck = streams.judge_health(503, said)
    assert stuck.result is Result.FAILED and "KV_ingest" in stuck.found and "restart" in stuck.hint


def test_lifecycle_rules_may_end_versions_and_nothing_else() -> None:
    deadly = Rule(ENABLED, rule_filter=Filter(prefix=""), rule_id="old", expiration=Expiration(days=30))
    mild = Rule(
        ENABLED,
        rule_filter=Filter(prefix=""),
        noncurrent_version_expiration=NoncurrentVersionExpiration(noncurrent_days=7),
    )
    found = store.judge_rules([mild, deadly])
    assert found.result is Result.FAILED and "old" in found.found and store.judge_rules([mild]).result is Result.OK
    assert store.judge_versions([], versioned=True).result is Result.WARNING
    assert store.judge_versions([mild], versioned=True).result is Result.OK
    assert store.judge_versions([], versioned=False).result is Result.OK


@pytest.mark.parametrize(
    ("begins", "ends", "result", "says"),
    [
        (-80, 10, Result.WARNING, "10 days"),
        (-80, 20, Result.OK, "20 days"),
        (-80, -1, Result.FAILED, "ended on 2026-11-25"),
        (1, 90, Result.FAILED, "from 2026-11-27"),
    ],
)
def test_a_certificate_is_told_before_it_ends(begins: int, ends: int, result: Result, says: str) -> None:
    now = datetime(2026, 11, 26, tzinfo=UTC)
    check = gateway.judge_dates(now + timedelta(days=begins), now + timedelta(days=ends), now)
    assert check.result is result and says in check.found and bool(check.hint) is (result is not Result.OK)


@pytest.mark.parametrize(
    ("host", "safe"), [("127.0.0.1", True), ("localhost", True), ("10.0.0.7", False), ("code.example", False)]
)
def test_plain_http_is_for_this_machine_only(host: str, safe: bool) -> None:
    checks, may_have_the_key = gateway._plain(host)
    assert may_have_the_key is safe and [check.result for check in checks] == [Result.FAILED] * (not safe)


def test_a_service_that_the_gateway_cannot_reach_is_named() -> None:
    assert gateway.judge_services({"ingest": "serving", "trainer": "serving"}).result is Result.OK
    found = gateway.judge_services({"ingest": "serving", "trainer": "unreachable"})
    assert found.result is Result.FAILED and found.found == "trainer unreachable"
