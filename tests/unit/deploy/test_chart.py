"""The chart: lint, Kubernetes' and KEDA's own schemas, and what must hold for every workload."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from tests.unit.deploy.chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    Object,
    container,
    example,
    of_kind,
    pod,
    render,
    rendered,
    workloads,
)

OURS = {"ingest", "scanner", "scanner-worker", "trainer", "trainer-worker", "inference", "gateway"}
PORTS = {"ingest": 50051, "scanner": 50052, "trainer": 50053, "inference": 50054, "gateway": 8080}

schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
every_example = pytest.mark.parametrize("name", EXAMPLES)


@every_example
def test_helm_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(str(CHART), example(name), strict=True)
    findings = [found for found in report["messages"] if "icon is recommended" not in found["error"]]
    assert not findings and not report["errors"]


@pytest.fixture(autouse=True)
def schemas_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validator reads its megabytes of JSON anew for every object."""
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schema_contents)


@pytest.mark.parametrize(
    ("name", "version"), [*((name, kubernetes_validate.latest_version()) for name in EXAMPLES), ("ha", "1.30")]
)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    for found in rendered(name):
        if found["kind"] not in ("ScaledObject", "PodMonitor", "PrometheusRule"):
            kubernetes_validate.validate(found, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    broken = copy.deepcopy(workloads(rendered("ha"))["inference"])
    broken["spec"]["template"]["spec"]["containers"][0]["livenes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def keda_schema() -> Object:
    """KEDA's own, and strict: Kubernetes would drop a field that it does not know, without a word."""
    definition = yaml.safe_load(Path(__file__).with_name("keda_scaledobjects.yaml").read_text())

    def closed(schema: Any) -> Any:
        if isinstance(schema, list):
            return [closed(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        inner = {key: closed(value) for key, value in schema.items()}
        if "properties" in inner and isinstance(inner["properties"], dict) and "additionalProperties" not in inner:
            inner["additionalProperties"] = False
        return inner

    schema: Object = closed(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def test_keda_knows_every_field() -> None:
    scaled = of_kind(rendered("ha"), "ScaledObject")
    targets = {found["spec"]["scaleTargetRef"]["name"]: found for found in scaled}
    assert set(targets) == {
        "demo-codegraft-scanner-worker",
        "demo-codegraft-trainer-worker",
        "demo-codegraft-inference",
    }
    schema = keda_schema()
    for found in scaled:
        jsonschema.validate(found, schema)
    broken = copy.deepcopy(scaled[0]) | {"spec": {**scaled[0]["spec"], "maxReplicas": 3}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_workers_are_scaled_by_the_consumers_that_they_share() -> None:
    from services.core.jobs import nats
    from services.scanner import part_worker
    from services.scanner import servicer as scanner
    from services.trainer import servicer as trainer

    kinds = {"scanner-worker": {scanner.KIND, part_worker.KIND}, "trainer-worker": {trainer.KIND}}
    for found in of_kind(rendered("ha"), "ScaledObject"):
        component = found["metadata"]["labels"]["app.kubernetes.io/component"]
        triggers = found["spec"]["triggers"]
        if component == "inference":
            assert [one["type"] for one in triggers] == ["prometheus"]
            assert "codegraft_inference_queue_depth" in triggers[0]["metadata"]["query"]
        else:
            assert {one["metadata"]["consumer"] for one in triggers} == {
                nats.durable(kind) for kind in kinds[component]
            }
            assert all(one["metadata"]["stream"] == nats.STREAM for one in triggers)


@every_example
def test_what_keda_scales_has_no_replicas_of_its_own(name: str) -> None:
    scaled = {found["spec"]["scaleTargetRef"]["name"] for found in of_kind(rendered(name), "ScaledObject")}
    for workload in workloads(rendered(name)).values():
        assert ("replicas" in workload["spec"]) == (workload["metadata"]["name"] not in scaled)


@every_example
def test_pods_are_restricted_and_bounded(name: str) -> None:
    for component, workload in workloads(rendered(name)).items():
        spec, only = pod(workload), container(workload)
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0, component
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(only["resources"]["limits"]), component
        assert {"cpu", "memory"} <= set(only["resources"]["requests"]), component
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
        assert spec["serviceAccountName"] == workload["metadata"]["name"]
        assert "hostNetwork" not in spec and "hostPath" not in str(spec["volumes"])


@every_example
def test_no_pod_may_talk_to_kubernetes_unless_it_makes_jobs(name: str) -> None:
    accounts = {found["metadata"]["name"]: found for found in of_kind(rendered(name), "ServiceAccount")}
    for component, workload in workloads(rendered(name)).items():
        spec = pod(workload)
        assert not accounts[spec["serviceAccountName"]]["automountServiceAccountToken"]
        may = name == "gpu" and component == "trainer-worker"
        assert spec["automountServiceAccountToken"] == may, component
    roles = of_kind(rendered(name), "Role")
    assert bool(roles) == (name == "gpu")
    for role in roles:
        assert {verb for rule in role["rules"] for verb in rule["verbs"]} <= {
            "create",
            "delete",
            "get",
            "list",
            "watch",
        }
        assert "*" not in str(role["rules"])


@every_example
def test_probes_ask_where_the_service_listens(name: str) -> None:
    for component, workload in workloads(rendered(name)).items():
        only = container(workload)
        ports = {port["containerPort"] for port in only["ports"]} | {port["name"] for port in only["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = only[kind]
            if "exec" in asked:
                assert asked["exec"]["command"][:3] == ["python", "-m", "services.core.rpc.probe"]
                continue
            how = asked.get("grpc") or asked.get("httpGet") or asked["tcpSocket"]
            assert how["port"] in ports, (component, kind)
        if component in OURS:
            port = PORTS[component.removesuffix("-worker")]
            assert {"name": "CODEGRAFT_LISTEN", "value": f"0.0.0.0:{port}"} in only["env"] and port in ports
            assert ("grpc" in only["livenessProbe"]) == (name != "external" and component != "gateway")


def test_a_replica_is_balanced_to_once_its_model_is_loaded() -> None:
    from services.inference.assembly import COMPLETION_SERVICE

    probes = container(workloads(rendered("ha"))["inference"])
    assert probes["readinessProbe"]["grpc"]["service"] == COMPLETION_SERVICE
    assert "service" not in probes["livenessProbe"]["grpc"] and "service" not in probes["startupProbe"]["grpc"]
    command = container({**workloads(rendered("external"))["inference"]})["readinessProbe"]["exec"]["command"]
    assert command[-2:] == ["--service", COMPLETION_SERVICE]


def test_startup_probes_outlast_the_wait_for_nats_and_the_store() -> None:
    from services.core.config import CoreSettings

    probe = container(workloads(rendered("ha"))["ingest"])["startupProbe"]
    patience = CoreSettings.model_fields["startup_timeout_seconds"].default
    assert probe["periodSeconds"] * probe["failureThreshold"] > patience


@every_example
def test_grace_is_longer_than_what_a_stop_takes(name: str) -> None:
    from services.core.jobs.runner import SHUTDOWN_SECONDS

    for component in OURS & set(workloads(rendered(name))):
        workload = workloads(rendered(name))[component]
        before = float(container(workload)["lifecycle"]["preStop"]["exec"]["command"][-1])
        (drain,) = [one["value"] for one in container(workload)["env"] if one["name"] == "CODEGRAFT_DRAIN_SECONDS"]
        grace = pod(workload)["terminationGracePeriodSeconds"]
        assert grace >= before + max(float(drain), 2 * SHUTDOWN_SECONDS) + 5, component


@every_example
def test_budgets_and_services_select_the_pods_they_are_named_for(name: str) -> None:
    found = workloads(rendered(name))
    budgets = of_kind(rendered(name), "PodDisruptionBudget")
    assert {one["metadata"]["name"] for one in budgets} == {one["metadata"]["name"] for one in found.values()}
    for one in [*budgets, *of_kind(rendered(name), "Service")]:
        selector = one["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        chosen = [
            component
            for component, workload in found.items()
            if selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert chosen == [one["metadata"]["labels"]["app.kubernetes.io/component"]]
    for one in budgets:
        assert one["spec"]["maxUnavailable"] == 1


@every_example
def test_what_is_called_is_never_without_a_replica_in_an_upgrade(name: str) -> None:
    for component, workload in workloads(rendered(name)).items():
        if component in OURS and name != "gpu":
            strategy = workload["spec"]["strategy"]["rollingUpdate"]
            assert (strategy["maxUnavailable"] == 0) == (not component.endswith("-worker")), component


def test_gpus_are_limits_and_tolerations() -> None:
    found = workloads(rendered("gpu"))
    gpus = {name: container(found[name])["resources"]["limits"].get("nvidia.com/gpu") for name in found}
    assert {name: number for name, number in gpus.items() if number} == {
        "scanner-worker": 1,
        "trainer-worker": 4,
        "inference": 1,
    }
    for component, number in gpus.items():
        keys = [one["key"] for one in pod(found[component]).get("tolerations", [])]
        assert ("nvidia.com/gpu" in keys) == bool(number)
    assert "example.com/inference-only" in str(pod(found["inference"])["tolerations"])


def test_jetstream_has_three_servers_and_every_stream_three_copies() -> None:
    objects = rendered("ha")
    nats = workloads(objects)["nats"]
    assert nats["spec"]["replicas"] == 3
    config = next(one["data"] for one in of_kind(objects, "ConfigMap") if "nats.conf" in one["data"])["nats.conf"]
    hosts = re.findall(r"nats://(\S+):6222", config)
    assert hosts == [f"demo-codegraft-nats-{number}.demo-codegraft-nats.{NAMESPACE}.svc" for number in range(3)]
    stores = stores_of(objects)
    assert stores["CODEGRAFT_NATS_REPLICAS"] == "3"
    assert stores["CODEGRAFT_NATS_URL"] == ",".join(f"nats://{host}:4222" for host in hosts)
    spread = pod(nats)["topologySpreadConstraints"][0]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "DoNotSchedule")
    assert stores_of(rendered("trial"))["CODEGRAFT_NATS_REPLICAS"] == "1"


def test_nats_and_the_store_of_others_are_used_as_they_are() -> None:
    objects = rendered("external")
    assert not {"nats", "minio"} & set(workloads(objects))
    stores = stores_of(objects)
    assert stores["CODEGRAFT_NATS_URL"] == example("external")["externalNats"]["url"]
    assert (stores["CODEGRAFT_S3_ENDPOINT"], stores["CODEGRAFT_S3_SECURE"]) == ("s3.example.com:443", "true")
    assert stores_of(rendered("trial"))["CODEGRAFT_S3_SECURE"] == "false"


def stores_of(objects: tuple[Object, ...]) -> dict[str, str]:
    found: dict[str, str] = next(
        one["data"] for one in of_kind(objects, "ConfigMap") if "CODEGRAFT_NATS_URL" in one["data"]
    )
    return found


def test_images_are_named_by_digest_where_one_is_given() -> None:
    found = workloads(rendered("external"))
    digest = example("external")["image"]["digests"]["ingest"]
    assert container(found["ingest"])["image"] == f"registry.example.com/ml/codegraft-ingest@{digest}"
    assert container(found["scanner-worker"])["image"] == "registry.example.com/ml/codegraft-scanner:0.1.0"
    assert pod(found["ingest"])["imagePullSecrets"] == [{"name": "registry"}]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "s3.endpoint"),
        ({"minio": {"enabled": True}, "nats": {"enabled": False}}, "externalNats.url"),
        ({"minio": {"enabled": True}, "nats": {"replicas": 2}}, "/nats/replicas"),
        ({"minio": {"enabled": True}, "inference": {"replica": 2}}, "replica"),
        ({"minio": {"enabled": True}, "inference": {"settings": {"inference_kv_token": 2}}}, "inference_kv_token"),
        ({"minio": {"enabled": True}, "scanner": {"settings": {"scanner_workers": 2}}}, "scanner_workers"),
        ({"s3": {"endpoint": "https://s3.example.com"}}, "/s3/endpoint"),
        ({"minio": {"enabled": True}, "trainerWorker": {"jobs": {"enabled": True}}}, "trainerWorker.jobs.claim"),
        (
            {
                "minio": {"enabled": True},
                "nats": {"enabled": False},
                "externalNats": {"url": "nats://n:4222"},
                "trainerWorker": {"autoscaling": {"enabled": True}},
            },
            "externalNats.monitoring",
        ),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: Object, says: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(says)):
        render(values)


def test_every_value_is_described() -> None:
    """README.md has a row for every value, and no row for one that is not there."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    described = set(re.findall(r"^\| `([^`]+)` \|", (CHART / "README.md").read_text(), re.MULTILINE))

    def leaves(tree: Object, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in tree.items():
            nested = isinstance(value, dict) and value and key not in ("requests", "limits")
            found |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key}
        return found

    assert described == leaves(values)
