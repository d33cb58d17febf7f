"""Training in a cluster: a run's processes as an indexed Job with a headless Service, in which torchrun finds itself.

    python -m services.trainer.launch.kubernetes FOLDER --cluster cluster.toml | kubectl create --filename -

Nothing but Kubernetes' own objects is used, so that no operator has to be installed. One pod is one node of torchrun;
rank 0 is on the pod of index 0. Worker and pods share the folder, the datasets and the model cache through a volume
that all of them mount at the same path (ReadWriteMany): the worker follows the folder wherever the pods are. The name
carries the attempt's epoch, so that deleting the objects of an epoch fences it and no other.

This renders; it submits nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core import names
from services.core.errors import CodegraftError, InvalidArgument
from services.trainer.launch import MAX_RESTARTS, STORE_OF_ITS_OWN
from services.trainer.launch.folder import RunFolder

PORT = 29400
_LONGEST_NAME = 55
"""Characters; the pods' host names add an index, and Kubernetes allows 63."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SecretKey(_Strict):
    """Where the value of an environment variable is kept."""

    name: str
    """Of the Secret."""
    key: str
    """In it."""


class Toleration(_Strict):
    """Of a node's taint, as Kubernetes has it."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Cluster(_Strict):
    """What a deployment decides about the pods; the TOML file of ``--cluster``."""

    image: str
    """Image with the trainer in it, best named by digest."""
    claim: str
    """PersistentVolumeClaim (ReadWriteMany) that the trainer mounts too."""
    mount: Path = Path("/var/lib/codegraft")
    """Where both mount it."""
    namespace: str = "default"
    nodes: int = Field(default=1, ge=1)
    """Pods of a run."""
    gpus: int = Field(default=1, ge=0)
    """GPUs of a pod, one process each; without any there is one process."""
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str = "8"
    """Of a pod."""
    memory: str = "64Gi"
    """Of a pod."""
    user: int = Field(default=10001, ge=1)
    """User and group id of the processes, and group of the volume."""
    secrets: dict[str, SecretKey] = {}
    """Environment variables, by name (a Hub token, say). Their values never come into the manifest."""
    tolerations: tuple[Toleration, ...] = ()
    node_selector: dict[str, str] = {}


def load(file: Path) -> Cluster:
    """Reads a cluster's TOML file.

    Raises:
        InvalidArgument: it is missing, no TOML, or has a wrong value; names the field.
    """
    try:
        return Cluster.model_validate(tomllib.loads(file.read_text()))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(f"{field}: {first['msg']}", field=field, hint=f"Correct {file}.") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", field="cluster", hint="Give a TOML file.") from None


def render(folder: Path, run: str, epoch: int, cluster: Cluster) -> list[dict[str, Any]]:
    """The objects that train a run: a Service and a Job.

    Args:
        folder: of the run, prepared, below ``cluster.mount``.
        run: resource name.
        epoch: of the attempt.

    Raises:
        InvalidArgument: the pods would not see the folder.
    """
    if not folder.is_relative_to(cluster.mount):
        raise InvalidArgument(
            f"{folder} is not below {cluster.mount}, where the pods mount the shared volume",
            field="folder",
            hint="Let the trainer keep its runs' folders on that volume.",
        )
    name = job_name(run, epoch)
    labels = {
        "app.kubernetes.io/name": "codegraft-training",
        "app.kubernetes.io/part-of": "codegraft",
        "app.kubernetes.io/instance": name,
    }
    metadata = {
        "name": name,
        "namespace": cluster.namespace,
        "labels": labels,
        "annotations": {"codegraft.dev/run": run, "codegraft.dev/epoch": str(epoch)},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",  # headless: each pod gets a name of its own
            "publishNotReadyAddresses": True,  # they find each other before any is ready
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": cluster.nodes,
            "parallelism": cluster.nodes,
            "backoffLimit": 3 * cluster.nodes,
            "ttlSecondsAfterFinished": 24 * 3600,
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(folder, name, cluster),
            },
        },
    }
    return [service, job]


def job_name(run: str, epoch: int) -> str:
    """A name for the objects of one attempt: a DNS label, different for every run and epoch."""
    parts = names.parse(names.RUN, run)
    suffix = f"-{hashlib.sha256(run.encode()).hexdigest()[:8]}-{epoch}"
    return f"run-{parts['run']}"[: _LONGEST_NAME - len(suffix)].rstrip("-") + suffix


def _pod(folder: Path, name: str, cluster: Cluster) -> dict[str, Any]:
    resources: dict[str, str] = {"cpu": cluster.cpu, "memory": cluster.memory}
    if cluster.gpus:
        resources[cluster.gpu_resource] = str(cluster.gpus)
    command = [
        "torchrun",
        f"--nnodes={cluster.nodes}",
        f"--nproc-per-node={max(1, cluster.gpus)}",
        f"--max-restarts={MAX_RESTARTS}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={name}-0.{name}.{cluster.namespace}.svc:{PORT}",
        f"--rdzv-id={name}",
        "--module",
        "services.trainer.launch.process",
        str(folder),
    ]
    env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in STORE_OF_ITS_OWN.items()]
    env += [
        {"name": variable, "valueFrom": {"secretKeyRef": secret.model_dump()}}
        for variable, secret in cluster.secrets.items()
    ]
    return {
        "subdomain": name,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.user,
            "runAsGroup": cluster.user,
            "fsGroup": cluster.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": cluster.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations],
        "containers": [
            {
                "name": "training",
                "image": cluster.image,
                "command": command,
                "env": env,
                "ports": [{"name": "rendezvous", "containerPort": PORT}],
                # As much as it asks for, no more: a neighbour must not be able to starve one rank, for all wait for it.
                "resources": {"requests": resources, "limits": resources},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    {"name": "shared", "mountPath": str(cluster.mount)},
                    {"name": "scratch", "mountPath": "/tmp"},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": cluster.claim}},
            {"name": "scratch", "emptyDir": {}},
            # NCCL moves data between the GPUs of a pod through it; the default of 64 MiB is too little.
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def main() -> int:
    """Prints the objects as one JSON list."""
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.launch.kubernetes",
        description="Renders the Kubernetes objects that train a run, for kubectl create.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder, prepared by the worker, on the shared volume")
    parser.add_argument("--cluster", type=Path, required=True, help="TOML file; see Cluster in this module")
    parser.add_argument("--epoch", type=int, default=1, help="of the attempt; part of the objects' name")
    given = parser.parse_args()
    try:
        run = RunFolder(given.folder).spec().run
        objects = render(given.folder, run, given.epoch, load(given.cluster))
    except (CodegraftError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
