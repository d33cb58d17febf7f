"""Serving policies: which checkpoint a project wants, durable in JetStream KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_OFF,
    SERVING_MODE_PINNED,
    ServedVersion,
    Serving,
    ServingMode,
    Split,
)
from services.core.errors import EtagMismatch, FailedPrecondition, ResourceExists, ServingNotFound
from services.core.state import Table

HISTORY = 20
"""Versions of which a policy's record tells: it is read with every look at the policy, so it stays small."""


@dataclass(frozen=True, slots=True)
class Best:
    """A checkpoint that the trainer calls the best of a project."""

    checkpoint: str
    sha256: str
    base_model: str
    base_digest: str
    test_loss: float | None
    """Nats per token."""
    test_set: str = ""
    """Digest of the test set that it was measured on; empty when it is not known."""


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

    async def hold(self, checkpoint: str, time: timedelta) -> None:
        """Has a checkpoint kept for so long from now; raises what :meth:`keep` does."""
        ...


class Projects(Protocol):
    """Whoever knows the projects: ingest."""

    async def exists(self, project: str) -> bool:
        """Whether there is a project of that name; True when that cannot be found out now."""
        ...

    def confirmed(self, project: str) -> bool:
        """Whether a project that :meth:`exists` is known to, so that something may be written of it."""
        ...

    def forget(self, project: str) -> None:
        """It was deleted: what is remembered of it is not true any more."""
        ...

    async def kept_since(self, project: str) -> float | None:
        """Since when it wants texts of its completions kept, seconds since 1970; None when it does not want that now,
        or when there is none of that name.

        Raises:
            Unavailable, DeadlineExceeded: ingest does not answer.
        """
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

    async def forget(self, project: str, before: float) -> None:
        """Deletes a project's policy when it was set before a moment, in seconds since 1970.

        Raises:
            EtagMismatch: it is being changed.
        """
        there = await self.find(project)
        if there is not None and there.update_time.ToNanoseconds() / 1e9 < before:
            with suppress(ServingNotFound):  # another replica was faster
                await self._table.delete(there.name, etag=there.etag)


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint that a policy may name, as its manifest says; the empty one is the base model."""

    checkpoint: str = ""
    sha256: str = ""
    test_loss: float | None = None
    test_set: str = ""


BASE = Choice()


def want(serving: Serving, choice: Choice | Best) -> None:
    """Sets what a policy resolves to; nothing waits any more."""
    newest = serving.history[0] if serving.history else None
    changes = newest is None or (newest.checkpoint, newest.sha256) != (choice.checkpoint, choice.sha256)
    if serving.wanted_checkpoint not in ("", choice.checkpoint):
        serving.previous_checkpoint = serving.wanted_checkpoint
    serving.wanted_checkpoint, serving.wanted_sha256 = choice.checkpoint, choice.sha256
    serving.wanted_test_set = choice.test_set
    serving.ClearField("wanted_test_loss")
    if choice.test_loss is not None:
        serving.wanted_test_loss = choice.test_loss
    for name in ("waiting_checkpoint", "waiting_sha256", "waiting_test_loss"):
        serving.ClearField(name)
    if changes:
        now = ServedVersion(time=_now(), checkpoint=choice.checkpoint, sha256=choice.sha256, mode=serving.mode)
        if choice.test_loss is not None:
            now.test_loss = choice.test_loss
        serving.history.insert(0, now)
        del serving.history[HISTORY:]


def named(serving: Serving) -> set[str]:
    """The checkpoints that replicas may have to load for a policy, also those of the next word by a person."""
    wanted = (serving.wanted_checkpoint, serving.previous_checkpoint, serving.waiting_checkpoint)
    return {*wanted, serving.split.checkpoint} - {""}


def called(serving: Serving, sha256: str) -> str:
    """What a policy calls a version; empty for one that it does not name."""
    names = [
        (serving.wanted_sha256, serving.wanted_checkpoint),
        (serving.split.sha256, serving.split.checkpoint),
        (serving.waiting_sha256, serving.waiting_checkpoint),
        *((each.sha256, each.checkpoint) for each in serving.history),
    ]
    return next((name for known, name in names if known == sha256), "")


def set_mode(
    serving: Serving, mode: ServingMode, pinned: Choice, best: Best | Choice | None, split: Split | None
) -> None:
    """Sets the policy as a whole.

    Args:
        pinned: what PINNED names.
        best: what LATEST_BEST finds now, the base model when no run has a checkpoint; None when that is not known.
        split: with its SHA-256; None ends one.
    """
    before = serving.mode
    serving.mode, serving.decided = mode, True
    serving.pinned_checkpoint = pinned.checkpoint if mode == SERVING_MODE_PINNED else ""
    serving.ClearField("split")
    if split is not None:
        serving.split.CopyFrom(split)
    if mode == SERVING_MODE_OFF:
        want(serving, BASE)
    elif mode == SERVING_MODE_PINNED:
        want(serving, pinned)
    elif before == SERVING_MODE_LATEST_BEST:
        if isinstance(best, Best):
            follow_best(serving, best)
    elif best is not None:  # a person has asked for the best, so it need not wait for one
        want(serving, best)
    else:  # what serves goes on until the best is known, which need not wait then either
        serving.ClearField("wanted_test_loss")
        serving.wanted_test_set = ""


def follow_best(serving: Serving, best: Best) -> None:
    """Lets a LATEST_BEST policy resolve to a new best; other policies stay.

    It is decided from nothing but the record, within the compare-and-set that writes it, so all replicas agree. Within
    one run the best only gets better, so an older answer that comes late changes nothing. A best of another run that is
    worse than the wanted one on the same test set waits for :func:`approve`.
    """
    if serving.mode != SERVING_MODE_LATEST_BEST or best.sha256 in (serving.wanted_sha256, serving.waiting_sha256):
        return
    wanted = serving.wanted_test_loss if serving.HasField("wanted_test_loss") else None
    if _run(serving.wanted_checkpoint) == _run(best.checkpoint) and not _beats(best, wanted):
        return
    compared = bool(best.test_set) and best.test_set == serving.wanted_test_set
    if not compared or wanted is None or best.test_loss is None or best.test_loss <= wanted:
        want(serving, best)
        return
    waiting = serving.waiting_test_loss if serving.HasField("waiting_test_loss") else None
    if _run(serving.waiting_checkpoint) == _run(best.checkpoint) and not _beats(best, waiting):
        return
    serving.waiting_checkpoint, serving.waiting_sha256 = best.checkpoint, best.sha256
    serving.waiting_test_loss = best.test_loss


def approve(serving: Serving, checkpoint: str) -> None:
    """Lets the waiting checkpoint serve; one that serves already stays.

    Raises:
        FailedPrecondition: it does not wait.
    """
    if serving.waiting_checkpoint != checkpoint:
        if serving.wanted_checkpoint == checkpoint:
            return
        there = serving.waiting_checkpoint
        raise FailedPrecondition(
            f"{checkpoint} does not wait for approval" + (f", {there} does" if there else ", and nothing else does"),
            field="checkpoint",
            hint="Read the policy again, or pin the checkpoint.",
        )
    loss, serving.decided = serving.waiting_test_loss, True
    want(serving, Choice(checkpoint, serving.waiting_sha256, loss, serving.wanted_test_set))


def decided(serving: Serving) -> bool:
    """Whether a person has had a say in a policy. Records of older releases tell by what is no default."""
    chosen = serving.mode in (SERVING_MODE_OFF, SERVING_MODE_PINNED)
    return serving.decided or chosen or serving.HasField("split")


def _beats(best: Best, loss: float | None) -> bool:
    """Whether a new best is news within its own run."""
    return loss is None or best.test_loss is None or best.test_loss < loss


def _initial(project: str) -> Serving:
    return Serving(name=f"{project}/serving", mode=SERVING_MODE_LATEST_BEST)


def _run(checkpoint: str) -> str:
    return checkpoint.rpartition("/checkpoints/")[0]


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
