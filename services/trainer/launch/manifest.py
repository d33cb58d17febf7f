"""The objects that train a run in a cluster, as one list for ``kubectl create``. Needs no torch.

    codegraft train manifest FOLDER --cluster cluster.toml | kubectl create --filename -

or, where only the trainer is installed, ``python -m services.trainer.launch.manifest FOLDER --cluster cluster.toml``.
"""

from __future__ import annotations

import argparse
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.core.errors import CodegraftError, InvalidArgument
from services.trainer.launch import cluster, kubeflow, kubernetes
from services.trainer.launch.folder import RunFolder


class Kind(StrEnum):
    """What a run becomes."""

    JOB = "job"
    """An indexed Job with a headless Service; needs nothing but Kubernetes."""
    TRAINJOB = "trainjob"
    """A TrainJob of Kubeflow Trainer."""


def manifest(folder: Path, cluster_file: Path, *, epoch: int = 1, kind: Kind = Kind.JOB) -> dict[str, Any]:
    """The list of objects.

    Args:
        folder: the run's, prepared by the worker, on the shared volume.
        cluster_file: TOML, see services/trainer/launch/cluster.
        epoch: of the attempt; part of the objects' name.

    Raises:
        InvalidArgument: no run is prepared in the folder, the pods would not see it, or the file has a wrong value.
    """
    try:
        run = RunFolder(folder).spec().run
    except OSError as error:
        raise InvalidArgument(
            f"no run is prepared in {folder}: {error.strerror}",
            field="folder",
            hint="Give the folder of a run as its worker made it, with spec.binpb in it.",
        ) from None
    renders = kubernetes.render if kind is Kind.JOB else kubeflow.render
    return {"apiVersion": "v1", "kind": "List", "items": renders(folder, run, epoch, cluster.load(cluster_file))}


def main() -> int:
    """Prints the list as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.launch.manifest",
        description="Renders the Kubernetes objects that train a run, for kubectl create.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder, prepared by the worker, on the shared volume")
    parser.add_argument("--cluster", type=Path, required=True, help="TOML file; see services/trainer/launch/cluster.py")
    parser.add_argument("--epoch", type=int, default=1, help="of the attempt; part of the objects' name")
    parser.add_argument("--kind", type=Kind, choices=list(Kind), default=Kind.JOB, help="an indexed Job, or a TrainJob")
    given = parser.parse_args()
    try:
        rendered = manifest(given.folder, given.cluster, epoch=given.epoch, kind=given.kind)
    except CodegraftError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(rendered, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
