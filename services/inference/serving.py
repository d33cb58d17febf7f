"""Serving: policies as callers see them, and what this replica holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_PINNED,
    SERVING_MODE_UNSPECIFIED,
    Adapter,
    Serving,
    ServingMode,
    ServingStatus,
    Split,
)
from services.core import names
from services.core.audit import record as audit
from services.core.errors import (
    CheckpointNotFound,
    FailedPrecondition,
    InvalidArgument,
    InvalidPageSize,
    InvalidPageToken,
    ModelLoading,
    ProjectNotFound,
)
from services.inference.adapters.follower import Follower
from services.inference.adapters.loader import Loader
from services.inference.adapters.registry import Holding, Registry
from services.inference.adapters.swapper import converged
from services.inference.policy import Policies, Projects

if TYPE_CHECKING:
    from services.inference.model import LoadedModel

_PLACE_WAIT = 5.0
"""Seconds that LoadAdapter waits for a place in device memory."""


class ServingDesk:
    """What ServingService does, without its transport."""

    def __init__(
        self,
        *,
        policies: Policies,
        follower: Follower,
        registry: Registry,
        loader: Loader,
        projects: Projects,
        model: asyncio.Future[LoadedModel],
        model_id: str,
        replica: str,
    ) -> None:
        self._policies, self._follower, self._registry = policies, follower, registry
        self._loader, self._projects, self._model = loader, projects, model
        self._model_id, self._replica = model_id, replica

    async def set(self, parent: str, mode: ServingMode, checkpoint: str, split: Split | None, etag: str) -> Serving:
        """Sets a project's policy; raises what ServingService.SetServing lists."""
        await self._check_project(parent)
        if mode == SERVING_MODE_UNSPECIFIED or mode not in ServingMode.values():
            raise InvalidArgument("mode is not set", field="mode", hint="Use OFF, LATEST_BEST or PINNED.")
        if mode == SERVING_MODE_PINNED:
            _check_checkpoint(parent, checkpoint, "checkpoint")
        elif checkpoint:
            raise InvalidArgument(
                "a checkpoint goes with mode PINNED only",
                field="checkpoint",
                hint="Set mode to PINNED, or leave it out.",
            )
        if split is not None:
            if not 1 <= split.percent <= 99:
                raise InvalidArgument(
                    f"a share of {split.percent} % is no split",
                    field="split.percent",
                    hint="Use 1 to 99, or leave the split out.",
                )
            if split.checkpoint:
                _check_checkpoint(parent, split.checkpoint, "split.checkpoint")
            if split.checkpoint == checkpoint and mode != SERVING_MODE_LATEST_BEST:
                raise InvalidArgument(
                    "both sides of the split are the same version",
                    field="split.checkpoint",
                    hint="Name another version, or leave the split out.",
                )
        return await self._follower.set_policy(parent, mode, checkpoint, split, etag)

    async def approve(self, parent: str, checkpoint: str, etag: str) -> Serving:
        """Lets the waiting checkpoint serve; raises what ServingService.ApproveServing lists."""
        await self._check_project(parent)
        _check_checkpoint(parent, checkpoint, "checkpoint")
        return await self._follower.approve(parent, checkpoint, etag)

    async def get(self, parent: str) -> tuple[Serving, ServingStatus]:
        """A project's policy and this replica's status."""
        await self._check_project(parent)
        serving = await self._policies.get(parent)
        return serving, self.status(parent, serving)

    async def watch(self, parent: str) -> AsyncGenerator[tuple[Serving, ServingStatus], None]:
        """:meth:`get` now, and after every change."""
        await self._check_project(parent)
        async with aclosing(self._follower.changes(parent)) as changes:
            async for _ in changes:
                serving = await self._policies.get(parent)
                yield serving, self.status(parent, serving)

    def status(self, project: str, serving: Serving) -> ServingStatus:
        """What this replica serves for a project under that policy."""
        standing, route = self._follower.standing(project), self._registry.route(project)
        active, second = route.main, route.second
        split = Split(percent=route.percent)
        if second:
            split.checkpoint, split.sha256 = second.checkpoint, second.sha256
        return ServingStatus(
            replica=self._replica,
            active_checkpoint=active.checkpoint if active else "",
            active_sha256=active.sha256 if active else "",
            converged=converged(serving, route),
            failure=standing.failure,
            last_swap_seconds=standing.swap_seconds,
            streams=self._registry.streams(project),
            model=self._model_id,
            ready=self._is_ready(),
            active_split=split if route.percent else None,
        )

    def adapters(self, page_size: int, page_token: str) -> tuple[list[Adapter], str]:
        """One page of the adapters that this replica holds, by checkpoint."""
        if page_size < 0:
            raise InvalidPageSize(
                f"page_size is {page_size}", field="page_size", hint="Use 0 for the default or a positive number."
            )
        holdings, size = self._registry.holdings(), min(page_size or 50, 1000)
        if page_token and "/checkpoints/" not in page_token:
            raise InvalidPageToken(
                "page_token was not given out by this list", field="page_token", hint="Begin without a token."
            )
        rest = [holding for holding in holdings if holding.version.checkpoint > page_token]
        page = rest[:size]
        return [_adapter(holding) for holding in page], page[-1].version.checkpoint if len(rest) > size else ""

    async def load(self, checkpoint: str) -> Adapter:
        """Stages an adapter; raises what ServingService.LoadAdapter lists."""
        names.parse(names.CHECKPOINT, checkpoint, field="checkpoint")
        if not self._is_ready():
            raise ModelLoading("the model is still being loaded", hint="Try again in a moment.", retry_after=2.0)
        before = self._held(checkpoint)
        while True:
            loaded = await self._loader.load(checkpoint, self._model.result(), patience=_PLACE_WAIT)
            if holding := self._registry.keep(loaded.version.sha256):
                after = _adapter(holding, checkpoint)
                if before != after:
                    audit.note(checkpoint, before, after)
                return after

    def unload(self, checkpoint: str) -> None:
        """Frees a staged adapter; raises what ServingService.UnloadAdapter lists."""
        names.parse(names.CHECKPOINT, checkpoint, field="checkpoint")
        version = self._registry.ask(checkpoint)
        if version is None:
            raise CheckpointNotFound(f"{checkpoint} is not staged here", field="checkpoint", hint="List the adapters.")
        before = self._held(checkpoint)
        if not self._registry.drop(version.sha256):
            raise FailedPrecondition(
                f"a policy serves {checkpoint}", field="checkpoint", hint="Set the policy to another one first."
            )
        audit.note(checkpoint, before, None)

    def _held(self, checkpoint: str) -> Adapter | None:
        """What this replica holds of a checkpoint; no record in NATS says so."""
        found = [each for each in self._registry.holdings() if checkpoint in each.names]
        return _adapter(found[0], checkpoint) if found else None

    def _is_ready(self) -> bool:
        return self._model.done() and not self._model.cancelled() and self._model.exception() is None

    async def _check_project(self, parent: str) -> None:
        names.parse(names.PROJECT, parent, field="parent")
        if not await self._projects.exists(parent):
            raise ProjectNotFound(f"no project {parent}", field="parent", hint="Create the project first.", name=parent)


def _check_checkpoint(parent: str, checkpoint: str, field: str) -> None:
    names.parse(names.CHECKPOINT, checkpoint, field=field)
    if names.project_of(checkpoint) != parent:
        raise InvalidArgument(
            f"{checkpoint} is of another project", field=field, hint=f"Name a checkpoint of {parent}."
        )


def _adapter(holding: Holding, checkpoint: str = "") -> Adapter:
    """What the contract says of it.

    Args:
        checkpoint: the name that it was asked for by; of other projects, which may have the same weights, nothing is
            told then. Empty tells everything.
    """
    version, owner = holding.version, names.project_of(checkpoint) if checkpoint else ""
    return Adapter(
        checkpoint=checkpoint or version.checkpoint,
        sha256=version.sha256,
        lora_r=version.rank,
        size=version.size,
        streams=holding.streams,
        projects=[project for project in holding.projects if owner in ("", project)],
        checkpoints=[name for name in holding.names if owner in ("", names.project_of(name))],
    )
