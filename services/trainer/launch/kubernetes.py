"""Training in a cluster: a run's processes as an indexed Job with a headless Service, in which torchrun finds itself.

Nothing but Kubernetes' own objects is used, so that no operator has to be installed; for a cluster with Kubeflow see
:mod:`.kubeflow`. One pod is one node of torchrun; rank 0 is on the pod of index 0. Worker and pods share the folder,
the datasets and the model cache through a volume that all of them mount at the same path (ReadWriteMany): the worker
follows the folder wherever the pods are. The name carries the attempt's epoch, so that deleting the objects of an epoch
fences it and no other.

This renders; it submits nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from services.core import names
from services.core.errors import InvalidArgument
from services.trainer.launch import MAX_RESTARTS, STORE_OF_ITS_OWN
from services.trainer.launch.cluster import Cluster

PORT = 29400
_LONGEST_NAME = 50
"""Characters; the pods' host names add an index (Kubeflow's ``-node-0-`` too), and Kubernetes allows 63."""


def render(folder: Path, run: str, epoch: int, cluster: Cluster) -> list[dict[str, Any]]:
    """The objects that train a run: a Service and a Job.

    Args:
        folder: of the run, prepared, below ``cluster.mount``.
        run: resource name.
        epoch: of the attempt.

    Raises:
        InvalidArgument: the pods would not see the folder.
    """
    check_folder(folder, cluster)
    metadata = metadata_of(run, epoch, cluster)
    name, labels = metadata["name"], metadata["labels"]
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


def check_folder(folder: Path, cluster: Cluster) -> None:
    """Raises InvalidArgument when the pods would not see the folder."""
    if not folder.is_relative_to(cluster.mount):
        raise InvalidArgument(
            f"{folder} is not below {cluster.mount}, where the pods mount the shared volume",
            field="folder",
            hint="Let the trainer keep its runs' folders on that volume.",
        )


def metadata_of(run: str, epoch: int, cluster: Cluster) -> dict[str, Any]:
    """Name, labels and annotations of the objects of one attempt."""
    name = job_name(run, epoch)
    return {
        "name": name,
        "namespace": cluster.namespace,
        "labels": {
            "app.kubernetes.io/name": "codegraft-training",
            "app.kubernetes.io/part-of": "codegraft",
            "app.kubernetes.io/instance": name,
        },
        "annotations": {"codegraft.dev/run": run, "codegraft.dev/epoch": str(epoch)},
    }


def job_name(run: str, epoch: int) -> str:
    """A name for the objects of one attempt: a DNS label, different for every run and epoch."""
    parts = names.parse(names.RUN, run)
    suffix = f"-{hashlib.sha256(run.encode()).hexdigest()[:8]}-{epoch}"
    return f"run-{parts['run']}"[: _LONGEST_NAME - len(suffix)].rstrip("-") + suffix


def torchrun(folder: Path, name: str, endpoint: str, *size: str) -> list[str]:
    """The command of a node.

    Args:
        endpoint: host and port where the nodes meet.
        size: options that tell the numbers of nodes and of processes, where the environment does not.
    """
    return [
        "torchrun",
        *size,
        f"--max-restarts={MAX_RESTARTS}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={name}",
        "--module",
        "services.trainer.launch.process",
        str(folder),
    ]


def environment(cluster: Cluster) -> list[dict[str, Any]]:
    """Variables of the processes; secrets by reference."""
    env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in STORE_OF_ITS_OWN.items()]
    return env + [
        {"name": variable, "valueFrom": {"secretKeyRef": secret.model_dump()}}
        for variable, secret in cluster.secrets.items()
    ]


def resources(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Of a pod: as much as it asks for, no more: a neighbour must not starve one rank, for all wait for it."""
    wanted = {"cpu": cluster.cpu, "memory": cluster.memory}
    if cluster.gpus:
        wanted[cluster.gpu_resource] = str(cluster.gpus)
    return {"requests": wanted, "limits": wanted}


def pod_settings(cluster: Cluster) -> dict[str, Any]:
    """What every pod has beside its container: who it runs as, where, and its volumes."""
    return {
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
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": cluster.claim}},
            {"name": "scratch", "emptyDir": {}},
            # NCCL moves data between the GPUs of a pod through it; the default of 64 MiB is too little.
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def container_settings(cluster: Cluster) -> dict[str, Any]:
    """What the container may do, and where it finds the volumes."""
    return {
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


def _pod(folder: Path, name: str, cluster: Cluster) -> dict[str, Any]:
    endpoint = f"{name}-0.{name}.{cluster.namespace}.svc:{PORT}"
    size = f"--nnodes={cluster.nodes}", f"--nproc-per-node={max(1, cluster.gpus)}"
    return {
        "subdomain": name,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "training",
                "image": cluster.image,
                "command": torchrun(folder, name, endpoint, *size),
                "env": environment(cluster),
                "ports": [{"name": "rendezvous", "containerPort": PORT}],
                "resources": resources(cluster),
                **container_settings(cluster),
            }
        ],
        **pod_settings(cluster),
    }
