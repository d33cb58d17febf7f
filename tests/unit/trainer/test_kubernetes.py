"""The rendered objects, against what Kubernetes and Kubeflow publish of their fields."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from pydantic import ValidationError

from codegraft.trainer.v1.training_pb2 import TrainingSpec
from services.cli.main import main
from services.core.errors import InvalidArgument
from services.trainer.launch import kubeflow, kubernetes
from services.trainer.launch.cluster import Cluster, SecretKey, Toleration
from services.trainer.launch.folder import RunFolder

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


# --- Kubeflow ---


def train_job(cluster: Cluster) -> dict[str, Any]:
    (job,) = kubeflow.render(FOLDER, RUN, 3, cluster)
    return job


def as_kubeflow_reads_it(job: dict[str, Any]) -> dict[str, Any]:
    """By the types that Kubeflow publishes, which check the fields they know and leave out the others."""
    read = TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None
    return read.to_dict()


@pytest.mark.parametrize("cluster", [FULL, BARE])
def test_kubeflow_knows_every_field(cluster: Cluster) -> None:
    job = train_job(cluster)
    assert as_kubeflow_reads_it(job) == job


def test_a_field_that_kubeflow_does_not_know_is_found() -> None:
    job = train_job(FULL)
    (patch,) = job["spec"]["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    nodes["template"]["spec"]["template"]["spec"]["containers"][0]["gpus"] = 4
    assert as_kubeflow_reads_it(job) != job
    job = train_job(FULL)
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValidationError):
        as_kubeflow_reads_it(job)
    job = train_job(FULL)
    del job["spec"]["runtimeRef"]
    with pytest.raises(ValidationError):
        as_kubeflow_reads_it(job)


def test_a_train_job_trains_as_the_job_does() -> None:
    job, (_, plain) = train_job(FULL), objects(FULL)
    pod = plain["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (patch,) = job["spec"]["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = nodes["template"]["spec"]["template"]["spec"]
    for name in ("volumes", "securityContext", "nodeSelector", "tolerations"):
        assert patched[name] == pod[name]
    for name in ("volumeMounts", "securityContext"):
        assert patched["containers"][0][name] == container[name]
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["env"]) == (container["image"], container["env"])
    assert trainer["resourcesPerNode"] == container["resources"]
    assert "env" not in patched["containers"][0], "Kubeflow refuses it there for a container of this name"


def test_torchrun_finds_the_other_nodes_of_a_train_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import config_from_args, parse_args

    job = train_job(FULL)
    trainer, name = job["spec"]["trainer"], job["metadata"]["name"]
    # As Kubeflow's plugin for torch sets them, on the second node.
    told = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": "29500",
    }
    command = trainer["command"]
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
        command = [part.replace(f"$({variable})", value) for part in command]
    launch, _, arguments = config_from_args(parse_args(command[1:]))
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node, launch.max_restarts) == (2, 2, 4, 3)
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", f"{name}-node-0-0.{name}:29500")
    assert arguments[-3:] == ["-m", "services.trainer.launch.process", str(FOLDER)]
    assert len(f"{name}-node-0-999") <= 63


# --- the commands ---


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[str, str]:
    """A run's folder, and a cluster's file."""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.prepare(TrainingSpec(run=RUN))
    file = tmp_path / "cluster.toml"
    file.write_text(f'image = "codegraft"\nclaim = "runs"\nmount = "{tmp_path}"\n')
    return str(folder.path), str(file)


@pytest.mark.parametrize(("kind", "kinds"), [("job", ["Service", "Job"]), ("trainjob", ["TrainJob"])])
def test_the_command_prints_what_kubectl_reads(prepared: tuple[str, str], capsys: Any, kind: str, kinds: Any) -> None:
    folder, file = prepared
    argv = ["train", "manifest", folder, "--cluster", file, "--kind", kind, "--epoch", "7"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [item["kind"] for item in printed["items"]] == kinds
    assert all(item["metadata"]["name"].endswith("-7") for item in printed["items"])
    assert main([*argv, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == printed


def test_the_command_says_what_is_wrong(prepared: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    folder, file = prepared
    for argv, told in (
        ([str(tmp_path), "--cluster", file], "no run is prepared"),
        ([folder, "--cluster", str(tmp_path / "none.toml")], "cannot be read"),
        ([folder, "--cluster", file, "--kind", "pod"], "trainjob"),
    ):
        assert main(["train", "manifest", *argv]) == 2
        assert told in capsys.readouterr().err
    Path(file).write_text('image = "codegraft"\nclaims = "runs"\n')
    assert main(["train", "manifest", folder, "--cluster", file]) == 2
    assert "claim" in capsys.readouterr().err


def test_the_trainer_alone_can_render_too(prepared: tuple[str, str]) -> None:
    folder, file = prepared
    argv = [sys.executable, "-m", "services.trainer.launch.manifest", folder, "--cluster", file, "--kind", "trainjob"]
    printed = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert [item["kind"] for item in printed["items"]] == ["TrainJob"]
    Path(file).write_text('image = "codegraft"\nclaims = "runs"\n')
    refused = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "claim" in refused.stderr and "Traceback" not in refused.stderr


def test_the_command_line_loads_no_torch() -> None:
    script = "import sys, services.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
