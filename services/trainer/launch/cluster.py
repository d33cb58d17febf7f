"""What a deployment decides about the pods that train: one TOML file for all runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.errors import InvalidArgument


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
    """What a deployment decides about the pods; a TOML file."""

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
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime that a TrainJob refers to; an indexed Job needs none."""


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
