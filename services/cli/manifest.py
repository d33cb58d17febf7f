"""``codegraft train manifest``: what to give to kubectl so that a run trains in a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.trainer.launch.manifest import Kind
from services.trainer.launch.manifest import manifest as rendered


def manifest(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The run's folder, prepared by its worker, on the shared volume.")
    ],
    cluster: Annotated[Path, typer.Option(help="TOML file: image, claim, nodes, gpus, memory and more; see above.")],
    epoch: Annotated[int, typer.Option(min=1, help="Attempt at the run; part of the objects' name.")] = 1,
    kind: Annotated[
        Kind, typer.Option(help="job: an indexed Job with a Service. trainjob: a TrainJob of Kubeflow Trainer.")
    ] = Kind.JOB,
    json_: Annotated[bool, typer.Option("--json", help="One line instead of indented JSON.")] = False,
) -> None:
    """Render the Kubernetes objects that train a run by torchrun on several nodes. Needs no service, submits nothing.

    Only image and claim have no default in the cluster's file; of a run on two nodes with eight GPUs each it says:
    image = "registry.example/codegraft@sha256:…", claim = "codegraft-runs", nodes = 2, gpus = 8.
    All its fields are described in services/trainer/launch/cluster.py.

    Example: codegraft train manifest /var/lib/codegraft/runs/r1 --cluster cluster.toml | kubectl create -f -
    """
    objects = rendered(folder, cluster, epoch=epoch, kind=kind)
    sys.stdout.write(json.dumps(objects, indent=None if json_ else 2) + "\n")
