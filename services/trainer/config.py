"""Settings of the trainer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core.config import CoreSettings
from services.core.models.catalogue import DEFAULT_MODEL


class TrainerSettings(CoreSettings):
    """What the trainer needs besides the core's settings. Use ``services.core.config.load``."""

    trainer_model: str = DEFAULT_MODEL
    """Base model where a run names none."""
    trainer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where runs train; auto takes a GPU when there is one."""
    trainer_threads: int = Field(default=0, ge=0)
    """Threads of training on a CPU; 0 leaves it to torch (all cores)."""
    trainer_time_limit_seconds: float | None = Field(default=None, ge=1)
    """Time limit of runs that ask for none; unset means that those have no limit."""
    trainer_nice: int = Field(default=10, ge=0, le=19)
    """By how much the process lowers its priority, so that completions on the same cores stay fast."""
    trainer_launcher: Literal["elastic", "thread"] = "elastic"
    """Where runs train: in processes of their own, started by torch elastic, whose end is not the service's; or in a
    thread of the service, which starts at once and takes the service with it when memory runs out."""
    trainer_processes: int = Field(default=1, ge=1, le=64)
    """Processes that train one run together on this machine, each on a device of its own."""
    trainer_sharding: Literal["auto", "on", "off"] = "auto"
    """Whether the base model is spread over the processes of a run (FSDP2); auto does so when it would fill a GPU."""
    trainer_devices: tuple[str, ...] = ()
    """Devices by name, a JSON list such as ["cuda:0", "cuda:2"]; each run takes trainer_processes of them. Empty means
    every GPU, or the CPU, as trainer_device says."""
    trainer_workers: int | None = Field(default=None, ge=0)
    """Runs that this process works on at once, at most as many as there are devices for; unset means that many, 0 is a
    replica that only answers calls."""

    trainer_max_adapter_bytes: int = Field(default=4 << 30, ge=1)
    """Largest weights that ImportAdapter takes."""

    trainer_max_model_bytes: int = Field(default=200 << 30, ge=1)
    """Largest model that PushModel takes; it needs as much disk in the cache folder on its way."""

    def with_defaults(self, requested: Hyperparameters) -> Hyperparameters:
        """What a run asks for, with what the deployment sets where it asks for nothing."""
        settled = Hyperparameters()
        settled.CopyFrom(requested)
        if self.trainer_time_limit_seconds is not None and not settled.HasField("time_limit_seconds"):
            settled.time_limit_seconds = self.trainer_time_limit_seconds
        return settled
