"""Training in a cluster with Kubeflow Trainer, 2.2 or later: a run's processes as one TrainJob of its v1alpha1.

For clusters whose queue (Kueue) and whose people know TrainJobs. The runtime that it refers to is Kubeflow's own for
torch, with one replicated job "node" and in it one container "node"; what that runtime cannot know (the volume, whom
the processes run as) is patched in. Kubeflow tells the nodes by PET_* variables, which torchrun reads, how many they
are and where the first one is. The rest is as in :mod:`.kubernetes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.trainer.launch.cluster import Cluster
from services.trainer.launch.kubernetes import (
    check_folder,
    container_settings,
    environment,
    metadata_of,
    pod_settings,
    resources,
    torchrun,
)

_NODE = "node"
"""Replicated job, and container, of the runtime."""
_MANAGER = "codegraft.dev/trainer"
_ENDPOINT = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
"""Kubernetes puts the container's variables in."""


def render(folder: Path, run: str, epoch: int, cluster: Cluster) -> list[dict[str, Any]]:
    """The object that trains a run: a TrainJob. For the arguments see :func:`.kubernetes.render`.

    Raises:
        InvalidArgument: the pods would not see the folder.
    """
    check_folder(folder, cluster)
    metadata = metadata_of(run, epoch, cluster)
    pods = {
        "metadata": {"labels": metadata["labels"]},
        "spec": {**pod_settings(cluster), "containers": [{"name": _NODE, **container_settings(cluster)}]},
    }
    nodes = {"name": _NODE, "template": {"spec": {"template": pods}}}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": cluster.runtime,
            },
            "trainer": {
                "image": cluster.image,
                "command": torchrun(folder, metadata["name"], _ENDPOINT),
                "env": environment(cluster),
                "numNodes": cluster.nodes,
                "numProcPerNode": max(1, cluster.gpus),
                "resourcesPerNode": resources(cluster),
            },
            "runtimePatches": [
                {
                    "manager": _MANAGER,
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [nodes]}}},
                }
            ],
        },
    }
    return [job]
