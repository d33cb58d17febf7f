"""Serving policies: which checkpoint a project wants, durable in JetStream KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_OFF,
    SERVING_MODE_PINNED,
    Serving,
    ServingMode,
)
from services.core.errors import EtagMismatch, ResourceExists
from services.core.state import Table


@dataclass(frozen=True, slots=True)
class Best:
    """A checkpoint that the trainer calls the best of a project."""

    checkpoint: str
    sha256: str
    base_model: str
    base_digest: str
    test_loss: float | None
    """Nats per token."""


class BestSource(Protocol):
    """Whoever knows the best checkpoint: the trainer."""

    async def best(self, project: str, base_model: str) -> Best | None:
        """The best checkpoint of the latest run that has one; None when no run has.

        Raises:
            Unavailable, DeadlineExceeded: the trainer does not answer.
        """
        ...

    async def keep(self, checkpoint: str) -> None:
        """Has a checkpoint kept though its run has newer ones: a replica that starts later will want it.

        Raises:
            CheckpointNotFound: there is none, or it was deleted.
            Unavailable, DeadlineExceeded: the trainer does not answer.
        """
        ...


class Projects(Protocol):
    """Whoever knows the projects: ingest."""

    async def exists(self, project: str) -> bool:
        """Whether there is a project of that name; True when that cannot be found out now."""
        ...


class Policies:
    """The policies of all projects."""

    def __init__(self, table: Table[Serving]) -> None:
        self._table = table

    async def find(self, project: str) -> Serving | None:
        """A project's policy; None when it never had one."""
        return await self._table.find(f"{project}/serving")

    async def get(self, project: str) -> Serving:
        """A project's policy, or what stands for one that was never set: LATEST_BEST."""
        return await self.find(project) or _initial(project)

    async def change(self, project: str, change: Callable[[Serving], None], *, etag: str = "") -> Serving:
        """Changes a policy, making it first when need be; nothing is written when nothing changes.

        Raises:
            EtagMismatch: the policy is not at that etag.
        """

        def stamped(serving: Serving) -> None:
            before = Serving.FromString(serving.SerializeToString())
            change(serving)
            if serving != before:
                serving.update_time.GetCurrentTime()

        name = f"{project}/serving"
        if await self._table.find(name) is None:
            if etag:
                raise EtagMismatch(f"{name} has no policy of its own yet", field="etag", hint="Leave the etag out.")
            serving = _initial(project)
            change(serving)
            serving.update_time.CopyFrom(_now())
            try:
                return await self._table.create(serving)
            except ResourceExists:
                pass  # another replica was faster: change its record
        return await self._table.mutate(name, stamped, etag=etag)


def want(serving: Serving, checkpoint: str, sha256: str, test_loss: float | None = None) -> None:
    """Sets what a policy resolves to; empty strings for the base model."""
    serving.wanted_checkpoint, serving.wanted_sha256 = checkpoint, sha256
    serving.ClearField("wanted_test_loss")
    if test_loss is not None:
        serving.wanted_test_loss = test_loss


def set_mode(serving: Serving, mode: ServingMode, pinned: str = "") -> None:
    """Sets the policy itself."""
    serving.mode, serving.pinned_checkpoint = mode, pinned if mode == SERVING_MODE_PINNED else ""
    if mode == SERVING_MODE_OFF:
        want(serving, "", "")


def follow_best(serving: Serving, best: Best) -> None:
    """Lets a LATEST_BEST policy resolve to a new best; other policies stay.

    Within one run the best only gets better, so an older answer that comes late changes nothing.
    """
    if serving.mode != SERVING_MODE_LATEST_BEST:
        return
    same_run = _run(serving.wanted_checkpoint) == _run(best.checkpoint)
    known = serving.wanted_test_loss if serving.HasField("wanted_test_loss") else None
    if same_run and known is not None and best.test_loss is not None and best.test_loss >= known:
        return
    want(serving, best.checkpoint, best.sha256, best.test_loss)


def _initial(project: str) -> Serving:
    return Serving(name=f"{project}/serving", mode=SERVING_MODE_LATEST_BEST)


def _run(checkpoint: str) -> str:
    return checkpoint.rpartition("/checkpoints/")[0]


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
