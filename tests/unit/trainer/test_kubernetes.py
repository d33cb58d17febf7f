"""The rendered objects, against the schemas that Kubernetes publishes for its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from codegraft.trainer.v1.training_pb2 import TrainingSpec
from services.core.errors import InvalidArgument
from services.trainer.launch import kubernetes
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.kubernetes import Cluster, SecretKey, Toleration

RUN = "projects/demo/runs/01jd0000000000000000000000"
FOLDER = Path("/var/lib/codegraft/runs/one")
FULL = Cluster(
    image="registry.example/codegraft@sha256:" + "0" * 64,
    claim="codegraft-runs",
    namespace="ml",
    nodes=2,
    gpus=4,
    secrets={"HF_TOKEN": SecretKey(name="huggingface", key="token")},
    tolerations=(Toleration(key="nvidia.com/gpu", effect="NoSchedule"),),
    node_selector={"node.kubernetes.io/instance-type": "p5"},
)
BARE = Cluster(image="codegraft", claim="runs", gpus=0)


def objects(cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = kubernetes.render(FOLDER, RUN, 3, cluster)
    return service, job


@pytest.mark.parametrize("cluster", [FULL, BARE])
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(cluster: Cluster, version: str) -> None:
    for rendered in objects(cluster):
        kubernetes_validate.validate(rendered, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    _, job = objects(FULL)
    job["spec"]["template"]["spec"]["containers"][0]["gpus"] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_pods_find_each_other_through_the_service() -> None:
    service, job = objects(FULL)
    pod = job["spec"]["template"]
    name = service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == name and service["spec"]["clusterIP"] == "None"
    command = pod["spec"]["containers"][0]["command"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{name}.ml.svc:{service['spec']['ports'][0]['port']}" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2 and "--nnodes=2" in command


def test_gpus_are_processes_and_resources() -> None:
    container = objects(FULL)[1]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4" and "--nproc-per-node=4" in container["command"]
    container = objects(BARE)[1]["spec"]["template"]["spec"]["containers"][0]
    assert set(container["resources"]["limits"]) == {"cpu", "memory"} and "--nproc-per-node=1" in container["command"]


def test_torchrun_takes_the_command() -> None:
    from torch.distributed.run import config_from_args, parse_args

    command = objects(FULL)[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[0] == "torchrun"
    launch, entrypoint, arguments = config_from_args(parse_args(command[1:]))
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node, launch.max_restarts) == (2, 2, 4, 3)
    assert entrypoint == sys.executable
    assert arguments[-3:] == ["-m", "services.trainer.launch.process", str(FOLDER)]


def test_secrets_are_named_not_told() -> None:
    env = objects(FULL)[1]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "huggingface", "key": "token"}}} in env


def test_every_attempt_has_a_name_of_its_own() -> None:
    long = "projects/p/runs/" + "a" * 64
    seen = {kubernetes.job_name(run, epoch) for run in (RUN, long, long[:-1]) for epoch in (1, 2, 100)}
    assert len(seen) == 9 and all(len(f"{name}-99") <= 63 for name in seen)


def test_a_folder_that_the_pods_do_not_see() -> None:
    with pytest.raises(InvalidArgument) as caught:
        kubernetes.render(Path("/tmp/one"), RUN, 1, FULL)
    assert caught.value.field == "folder"


def test_the_command_prints_what_kubectl_reads(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.prepare(TrainingSpec(run=RUN))
    file = tmp_path / "cluster.toml"
    file.write_text(f'image = "codegraft"\nclaim = "runs"\nmount = "{tmp_path}"\n')
    argv = [sys.executable, "-m", "services.trainer.launch.kubernetes", str(folder.path), "--cluster", str(file)]
    printed = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert [item["kind"] for item in printed["items"]] == ["Service", "Job"]
    file.write_text('image = "codegraft"\nclaims = "runs"\n')
    refused = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "claim" in refused.stderr and "Traceback" not in refused.stderr
