"""deploy/compose.yaml, as docker compose itself reads it."""

from __future__ import annotations

import json
import os
import runpy
import stat
import subprocess
import sys
import sysconfig
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from services.cli.local import permissions
from services.core.auth.keys import ApiKey
from tests.unit.deploy.chart import ROOT, Object, container, rendered, workloads
from tests.unit.deploy.test_settings import CLASSES

FILE = ROOT / "deploy/compose.yaml"
THIRD_PARTIES = {"nats", "minio"}
SERVICES = {"ingest", "scanner", "trainer", "inference"}


@cache
def config(profile: str) -> Object:
    """`docker compose config`: everything merged, interpolated and checked. Needs no engine."""
    program = Path(sysconfig.get_path("scripts"), "docker-compose")
    run = subprocess.run(
        [str(program), "--file", str(FILE), "--profile", profile, "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, "HOME": "/nonexistent"},
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr, "it warns"
    found: Object = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_service_once_and_found_by_its_name(profile: str) -> None:
    services = config(profile)["services"]
    names: dict[str, str] = {}
    for name, service in services.items():
        for network, options in service["networks"].items():
            for alias in {name, *((options or {}).get("aliases", []))}:
                if network == "services":
                    names[alias] = name
    assert set(names) >= SERVICES
    assert set(services) == {names[one] for one in SERVICES} | {"gateway"} | THIRD_PARTIES
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
    gpus = {
        name
        for name, service in services.items()
        if service["deploy"]["resources"].get("reservations", {}).get("devices")
    }
    assert gpus == ({"scanner-gpu", "trainer-gpu", "inference-gpu"} if profile == "gpu" else set())


@pytest.mark.parametrize("profile", ["cpu", "gpu", "cli"])
def test_containers_are_closed_bounded_and_probed(profile: str) -> None:
    for name, service in config(profile)["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0 and int(limits["memory"]) > 0, name
        if name not in THIRD_PARTIES:
            assert service["user"] == "10001:10001"
            assert (ROOT / "deploy" / ".." / service["build"]["dockerfile"]).is_file()
        if name != "cli":
            assert service["healthcheck"]["test"][0] == "CMD"


def test_nats_and_the_store_are_within() -> None:
    found = config("cpu")
    assert found["networks"]["stores"]["internal"]
    for name in THIRD_PARTIES:
        assert set(found["services"][name]["networks"]) == {"stores"} and "ports" not in found["services"][name]
    assert ":latest" not in FILE.read_text()


def test_no_secret_is_in_the_environment() -> None:
    for service in config("cpu")["services"].values():
        for variable, value in (service.get("environment") or {}).items():
            assert not variable.endswith(("PASSWORD", "SECRET_KEY", "ACCESS_KEY", "CREDENTIAL_KEYS", "CONSOLE_KEY")), (
                value
            )


def new_secrets() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "deploy/new_secrets.py"))


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_new_secrets_open_what_they_should(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "secrets"
    script = new_secrets()
    made = script["write"](folder, script["credentials"]())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {Path(one["file"]).name for one in config("cpu")["secrets"].values()}
    assert {path.name for path in made} == files | {"operator.key"}
    told = tomllib.loads((folder / f"{service}.toml").read_text())
    assert set(told) <= set(CLASSES[service].model_fields)
    monkeypatch.setenv("CODEGRAFT_CONFIG", str(folder / f"{service}.toml"))
    settings = CLASSES[service]()
    assert settings.nats_user == service
    assert json.dumps(settings.nats_password.get_secret_value()) in (folder / "nats-auth.conf").read_text()
    assert settings.s3_secret_key.get_secret_value() == (folder / "s3-secret-key").read_text()
    assert bool(settings.api_key.get_secret_value()) == (service in permissions.CALLS)
    if service == "ingest":
        seeds = {seed["key"]: seed["role"] for seed in told["ingest_seed_keys"]}
        assert seeds.pop((folder / "operator.key").read_text().strip()) == "operator"
        callers = {name: tomllib.loads((folder / f"{name}.toml").read_text())["api_key"] for name in permissions.CALLS}
        assert seeds == {callers[name]: role for name, role in permissions.CALLS.items()}
        assert all(ApiKey.parse(key) for key in seeds)
    else:
        assert not [name for name in told if name.startswith("ingest")], "only ingest opens credentials"


def test_new_secrets_seal_the_consoles_cookies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = new_secrets()
    script["write"](tmp_path / "secrets", script["credentials"]())
    monkeypatch.setenv("CODEGRAFT_CONFIG", str(tmp_path / "secrets" / "gateway.toml"))
    assert len(CLASSES["gateway"]().gateway_console_key.get_secret_value()) >= 32  # type: ignore[attr-defined]
    assert config("cpu")["services"]["gateway"]["secrets"] == [{"source": "gateway.toml", "target": "settings"}]


def test_new_secrets_for_the_chart_are_those_that_its_pods_name() -> None:
    script = new_secrets()
    made = {one["metadata"]["name"]: one for one in json.loads(script["kubernetes"](script["credentials"]()))["items"]}
    for one in made.values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    for name in ("trial", "ha"):
        for workload in workloads(rendered(name)).values():
            for variable in container(workload).get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert made[reference["name"]]["stringData"][reference["key"]], variable


def test_keys_of_a_store_that_is_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ACCESS_KEY", "given")
    monkeypatch.setenv("S3_SECRET_KEY", "given-too")
    made = new_secrets()["credentials"]()
    assert (made["ingest"]["s3-access-key"], made["inference"]["s3-secret-key"]) == ("given", "given-too")


def test_secrets_are_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    run = [sys.executable, str(ROOT / "deploy/new_secrets.py"), str(folder)]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 0
    before = (folder / "ingest.toml").read_text()
    again = subprocess.run(run, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is there already" in again.stderr
    assert (folder / "ingest.toml").read_text() == before
