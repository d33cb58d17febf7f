"""Every variable that the chart, compose and the images set is a setting of the service that gets it, with a value it
takes; and the chart lets set what there is to set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from cryptography.fernet import Fernet

from services.cli.local import permissions
from services.core.auth.keys import ApiKey
from services.core.config import PREFIX, CoreSettings
from services.core.quota.limits import Defaults
from services.gateway.config import GatewaySettings
from services.inference.config import InferenceSettings
from services.ingest.config import IngestSettings
from services.scanner.config import ScannerSettings
from services.trainer.config import TrainerSettings
from tests.unit.deploy.chart import CHART, EXAMPLES, ROOT, Object, container, of_kind, pod, rendered, workloads

CLASSES: dict[str, type[CoreSettings]] = {
    "ingest": IngestSettings,
    "scanner": ScannerSettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "gateway": GatewaySettings,
}
MADE_BY_THE_CHART = {
    "ingest": {"ingest_credential_keys", "ingest_seed_keys"},  # out of the Secret
    "scanner": {
        "scanner_model",
        "scanner_workers",
        "scanner_device",
    },  # one model for all; those that answer calls work on nothing
    "scannerWorker": {"scanner_model"},
    "trainer": {"trainer_model", "trainer_workers", "trainer_device"},
    "trainerWorker": {"trainer_model"},
    "inference": {"inference_model", "inference_replica"},  # a pod's own name is the default
}
PLACEHOLDERS = {
    "CODEGRAFT_INGEST_CREDENTIAL_KEYS": json.dumps([Fernet.generate_key().decode()]),
    "CODEGRAFT_INGEST_SEED_KEYS": json.dumps([{"key": ApiKey.new("operator").text, "role": "operator"}]),
    "CODEGRAFT_GATEWAY_CONSOLE_KEY": "k" * 32,
    "CODEGRAFT_INFERENCE_THREADS": "4",
    "CODEGRAFT_SCANNER_THREADS": "4",
    "CODEGRAFT_TRAINER_THREADS": "4",
}
"""What the cluster puts in: secrets, and the container's limit of processors."""


def check(service: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> CoreSettings:
    """Reads the settings as the service would, after making sure that it knows each variable."""
    settings = CLASSES[service]
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX) and name != "CODEGRAFT_CONFIG"}
    for name in ours:
        if name.startswith(("CODEGRAFT_TLS_", "CODEGRAFT_GATEWAY_CERT_", "CODEGRAFT_GATEWAY_KEY_")):
            assert ours[name].startswith("/etc/codegraft/https/" if "GATEWAY" in name else "/etc/codegraft/tls/")
            ours[name] = __file__  # any file that is there
    unknown = {name for name in ours if name.removeprefix(PREFIX).lower() not in settings.model_fields}
    assert not unknown, f"{service} has no such settings"
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return settings()


def chart_environments(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    objects = rendered(name)
    maps: dict[str, dict[str, str]] = {
        one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap") if "nats.conf" not in one["data"]
    }
    for component, workload in workloads(objects).items():
        if component in ("nats", "minio"):
            continue
        only: Object = container(workload)
        variables: dict[str, str] = {}
        for source in only["envFrom"]:
            variables |= maps[source["configMapRef"]["name"]]
        for one in only["env"]:
            assert not ("value" in one and "valueFrom" in one)
            variables[one["name"]] = one.get("value") or PLACEHOLDERS.get(one["name"], "given-by-the-cluster")
        names = [one["name"] for one in only["env"]]
        assert len(names) == len(set(names)), f"{component} has a variable twice"
        yield component, variables


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_chart_sets_what_services_know(name: str) -> None:
    for component, variables in chart_environments(name):
        with pytest.MonkeyPatch.context() as monkeypatch:
            settings = check(component.removesuffix("-worker"), variables, monkeypatch)
        assert settings.listen.startswith("0.0.0.0:")
        assert settings.inference_address == "dns:///demo-codegraft-inference.ml.svc:50054"


def test_values_arrive_as_they_were_meant() -> None:
    """Helm reads numbers as floats, and lists have to become JSON."""
    found = dict(chart_environments("external"))["ingest"]
    assert found["CODEGRAFT_INGEST_KEPT_BYTES"] == "42949672960"
    assert json.loads(found["CODEGRAFT_INGEST_ALLOWED_NETWORKS"]) == ["10.40.0.0/16"]
    quotas = Defaults.model_validate_json(found["CODEGRAFT_QUOTA_PROJECT"])
    assert quotas == Defaults(storage_bytes=20 << 30, runs=2)
    found = dict(chart_environments("gpu"))["trainer-worker"]
    assert found["CODEGRAFT_TRAINER_TIME_LIMIT_SECONDS"] == "14400.5"
    assert found["CODEGRAFT_TRAINER_MODEL"] == "qwen2.5-coder-1.5b"
    assert found["CODEGRAFT_CACHE_DIR"] == "/var/lib/codegraft"


def test_those_that_answer_calls_work_on_nothing() -> None:
    found = dict(chart_environments("ha"))
    assert found["scanner"]["CODEGRAFT_SCANNER_WORKERS"] == found["trainer"]["CODEGRAFT_TRAINER_WORKERS"] == "0"
    assert "CODEGRAFT_SCANNER_WORKERS" not in found["scanner-worker"]
    assert "CODEGRAFT_TRAINER_WORKERS" not in found["trainer-worker"]


def test_plans_are_made_as_runs_will_be() -> None:
    """The trainer that answers PlanRun has no GPU, and knows of those that its workers have."""
    found = dict(chart_environments("gpu"))
    for setting in ("TIME_LIMIT_SECONDS", "PROCESSES"):
        assert (
            found["trainer"][f"CODEGRAFT_TRAINER_{setting}"] == found["trainer-worker"][f"CODEGRAFT_TRAINER_{setting}"]
        )
    assert found["trainer"]["CODEGRAFT_TRAINER_DEVICE"] == "cuda"
    assert dict(chart_environments("ha"))["trainer"]["CODEGRAFT_TRAINER_DEVICE"] == "cuda"
    assert dict(chart_environments("trial"))["trainer"]["CODEGRAFT_TRAINER_DEVICE"] == "cpu"


def test_tls_is_for_both_ends() -> None:
    for component, variables in chart_environments("external"):
        files = {name for name in variables if name.startswith("CODEGRAFT_TLS_")}
        server = {"CODEGRAFT_TLS_CLIENT_CA_FILE"} if component != "gateway" else set()
        assert files == {f"CODEGRAFT_TLS_{one}_FILE" for one in ("CA", "CERT", "KEY")} | server, component
    assert not [one for _, found in chart_environments("ha") for one in found if "TLS" in one]


def test_the_gateway_speaks_https_where_it_has_a_certificate() -> None:
    files = {f"CODEGRAFT_GATEWAY_{one}_FILE" for one in ("CERT", "KEY")}
    assert files <= set(dict(chart_environments("external"))["gateway"])
    assert not files & set(dict(chart_environments("ha"))["gateway"])
    for name, scheme in (("external", "HTTPS"), ("ha", None)):
        gateway = workloads(rendered(name))["gateway"]
        probes = [container(gateway)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
        assert {probe.get("scheme") for probe in probes} == {scheme}
        mounted = {one["secret"]["secretName"] for one in pod(gateway)["volumes"] if one["name"] == "https"}
        assert mounted == ({"gateway-tls"} if scheme else set())


def test_tokens_of_an_issuer_mean_what_the_values_say() -> None:
    found = dict(chart_environments("external"))["scanner"]
    assert json.loads(found["CODEGRAFT_AUTH_ROLES"]) == {"dev-team": "contributor", "ml-ops": "operator"}
    assert "CODEGRAFT_AUTH_ISSUER" not in dict(chart_environments("ha"))["scanner"]


def test_at_nats_every_service_may_do_what_the_table_says() -> None:
    """To mend: python -m services.cli.local.permissions > deploy/helm/codegraft/files/nats-users.conf"""
    made = permissions.nats_users({name: f"${name.upper()}_PASSWORD" for name in permissions.SERVICES})
    assert (CHART / "files/nats-users.conf").read_text() == made + "\n"
    for component, variables in chart_environments("ha"):
        if component != "gateway":
            assert variables["CODEGRAFT_NATS_USER"] == component.removesuffix("-worker")


def test_secrets_are_named_not_told_and_only_to_those_who_use_them() -> None:
    found = workloads(rendered("ha"))
    for component, workload in found.items():
        secrets = {one["name"] for one in container(workload).get("env", []) if "secretKeyRef" in str(one)}
        service = component.removesuffix("-worker")
        sealing = {"CODEGRAFT_INGEST_CREDENTIAL_KEYS", "CODEGRAFT_INGEST_SEED_KEYS"} <= secrets
        assert sealing == (component == "ingest"), component
        assert ("CODEGRAFT_S3_SECRET_KEY" in secrets) == (component not in ("gateway", "nats")), component
        assert ("CODEGRAFT_GATEWAY_CONSOLE_KEY" in secrets) == (component == "gateway"), component
        assert ("CODEGRAFT_API_KEY" in secrets) == (service in permissions.CALLS), component
        if component != "nats":
            named = {
                one["valueFrom"]["secretKeyRef"]["name"]
                for one in container(workload)["env"]
                if "secretKeyRef" in str(one)
            }
            assert named <= {f"codegraft-{service}"}, "of others it knows nothing"
    for one in of_kind(rendered("ha"), "ConfigMap"):
        assert not re.search(r"password|secret", re.sub(r"password: \$[A-Z]+_PASSWORD", "", str(one["data"])))


@pytest.mark.parametrize("part", MADE_BY_THE_CHART)
def test_every_setting_of_a_service_can_be_set_by_values(part: str) -> None:
    """To mend: add or remove the name below definitions.<part>Settings of values.schema.json."""
    service = part.removesuffix("Worker")
    fields = {field for field in CLASSES[service].model_fields if field.startswith(f"{service}_")}
    fields -= {field for field in CoreSettings.model_fields if field.startswith(f"{service}_")}
    schema = json.loads((CHART / "values.schema.json").read_text())
    allowed = set(schema["definitions"][f"{part}Settings"]["properties"])
    assert allowed == fields - MADE_BY_THE_CHART[part] | {"startup_timeout_seconds"}


@pytest.mark.parametrize("service", ["ingest", "scanner", "trainer", "inference"])
def test_images_set_what_services_know(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / f"deploy/images/{service}.Dockerfile").read_text()
    variables = dict(re.findall(r"(CODEGRAFT_\w+)=(\S+)", text))
    settings = check(service, variables, monkeypatch)
    port = CoreSettings.model_fields[f"{service}_address"].default.rpartition(":")[2]
    assert settings.listen == f"0.0.0.0:{port}" and f"EXPOSE {port}\n" in text


@pytest.mark.parametrize("service", ["ingest", "scanner", "trainer", "inference", "scanner-gpu", "trainer-gpu"])
def test_compose_sets_what_services_know(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"][service]
    settings = check(service.removesuffix("-gpu"), found["environment"], monkeypatch)
    assert found["ports"] == [f"127.0.0.1:{port}:{port}" for port in [settings.listen.rpartition(":")[2]]]
    seconds = int(found["stop_grace_period"].removesuffix("s"))
    assert seconds >= settings.drain_seconds + 15
