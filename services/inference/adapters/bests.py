"""The trainer's best checkpoint of a project, verified and staged before any policy resolves to it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from codegraft.inference.v1.serving_pb2 import Serving
from services.core import log
from services.core.errors import CodegraftError
from services.inference.adapters.loader import Device, Loaded, Loader
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.news import News
from services.inference.adapters.standing import Standings
from services.inference.adapters.swapper import Swapper
from services.inference.policy import Best, BestSource, Policies, follow_best

_log = log.get("inference.bests")


class Bests:
    """Best checkpoints on their way to serving. The caller holds the project's lock."""

    def __init__(
        self,
        source: BestSource,
        manifests: Manifests,
        loader: Loader,
        policies: Policies,
        standings: Standings,
        swapper: Swapper,
        news: News,
    ) -> None:
        self._source, self._manifests, self._loader, self._policies = source, manifests, loader, policies
        self._standings, self._swapper, self._news = standings, swapper, news

    async def take(
        self, serving: Serving, project: str, device: Device, began: float, announced: Best | None
    ) -> tuple[Serving, Loaded | None]:
        """Makes the best checkpoint the wanted one, or the waiting one, once it is verified.

        Args:
            serving: the policy, LATEST_BEST.
            began: when the change was noticed, on the monotonic clock.
            announced: what an event calls the best, for when the trainer does not answer.

        Returns:
            The policy after it, and the version that was staged for it.
        """
        known = {serving.wanted_sha256, serving.waiting_sha256}
        if (found := await self.verified(project, device, began, announced, but=known)) is None:
            return serving, None
        best, loaded = found
        serving = await self._policies.change(project, lambda s: follow_best(s, best))
        if serving.waiting_sha256 == best.sha256:
            _log.info("a best checkpoint waits for approval", project=project, checkpoint=best.checkpoint)
            await self._news.waiting(serving)
        return serving, loaded

    async def none(self, project: str, base_model: str) -> bool:
        """Whether the trainer says that no run has a checkpoint; False when it does not answer."""
        try:
            return await self._source.best(project, base_model) is None
        except CodegraftError:
            return False

    async def verified(
        self,
        project: str,
        device: Device,
        began: float,
        announced: Best | None = None,
        but: Set[str] = frozenset(),
    ) -> tuple[Best, Loaded] | None:
        """The project's best checkpoint, staged; None when there is none, it is refused or it is one in ``but``."""
        try:
            best = await self._source.best(project, device.base.model) or announced
        except CodegraftError as error:
            _log.warning("the trainer does not say what is best", project=project, error=error.message)
            best = announced
        if best is None or best.base_model != device.base.model:
            return None
        if best.sha256 in but or best.sha256 in self._standings[project].refused:
            return None
        try:
            loaded = await self._loader.load(best.checkpoint, device, sha256=best.sha256)
            return replace(best, test_set=await self._manifests.test_set(best.checkpoint)), loaded
        except CodegraftError as error:
            await self._swapper.refuse(project, best.checkpoint, best.sha256, error, began)
            return None
