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

import pytest

from services.ingest.config import IngestSettings
from tests.unit.deploy.chart import ROOT, Object

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
    assert set(services) == {names[one] for one in SERVICES} | THIRD_PARTIES
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
            assert not variable.endswith(("PASSWORD", "SECRET_KEY", "ACCESS_KEY", "CREDENTIAL_KEYS")), value


def test_new_secrets_open_what_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_secrets = runpy.run_path(str(ROOT / "deploy/new_secrets.py"))
    made = new_secrets["make"](tmp_path / "secrets")
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    files = {Path(one["file"]).name for one in config("cpu")["secrets"].values()}
    assert {path.name for path in made} == files
    monkeypatch.setenv("CODEGRAFT_CONFIG", str(tmp_path / "secrets/ingest.toml"))
    settings = IngestSettings()
    assert settings.vault is not None and settings.nats_user == "codegraft"
    shared = tomllib.loads((tmp_path / "secrets/services.toml").read_text())
    assert "ingest_credential_keys" not in shared, "only ingest opens credentials"
    assert shared["s3_secret_key"] == (tmp_path / "secrets/s3-secret-key").read_text()
    assert shared["nats_password"] in (tmp_path / "secrets/nats-auth.conf").read_text()


def test_secrets_are_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    run = [sys.executable, str(ROOT / "deploy/new_secrets.py"), str(folder)]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 0
    before = (folder / "ingest.toml").read_text()
    again = subprocess.run(run, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is there already" in again.stderr
    assert (folder / "ingest.toml").read_text() == before
