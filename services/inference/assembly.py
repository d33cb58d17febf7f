"""The parts of one inference replica, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from codegraft.inference.v1 import completion_pb2_grpc, feedback_pb2_grpc, serving_pb2_grpc
from codegraft.inference.v1.feedback_pb2 import FeedbackHour, KeptCompletion
from codegraft.inference.v1.serving_pb2 import Serving
from services.core import log
from services.core.auth import keyring
from services.core.errors import CodegraftError, NotFound, ServingNotFound
from services.core.leftovers import Leftovers
from services.core.models import stored
from services.core.models.catalogue import ModelSpec
from services.core.quota.limits import Kind
from services.core.quota.quotas import Quotas
from services.core.quota.usage import Count, usage
from services.core.rpc.server import Registration
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.telemetry import metrics
from services.core.threads import apart
from services.inference import kept
from services.inference.adapters.disk import DiskCache
from services.inference.adapters.follower import Follower
from services.inference.adapters.host import HostCache
from services.inference.adapters.loader import Loader
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.registry import Registry
from services.inference.collector import ReplicaCollector
from services.inference.completions import Completions
from services.inference.config import InferenceSettings
from services.inference.copies import mirror
from services.inference.engine.scheduler import Limits
from services.inference.feedback import Feedback
from services.inference.feedback_servicer import FeedbackServicer
from services.inference.forgetting import Forgetting
from services.inference.kept import Kept
from services.inference.policy import BestSource, Policies, Projects
from services.inference.prompter import Prompter
from services.inference.servicer import CompletionServicer, ServingServicer
from services.inference.serving import ServingDesk

if TYPE_CHECKING:
    from services.inference.model import LoadedModel

COMPLETION_SERVICE = "codegraft.inference.v1.CompletionService"
_MB = 1_000_000
_log = log.get("inference")


class Replica:
    """One replica. Made within the event loop it belongs to.

    Args:
        load: loads the model, in a thread; the first import of torch happens in it.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: InferenceSettings,
        spec: ModelSpec,
        *,
        bests: BestSource,
        projects: Projects,
        load: Callable[[], LoadedModel],
    ) -> None:
        self._load = load
        self._spec, self._cache_dir, self._artifacts = spec, settings.cache_dir, runtime.artifacts
        self.model: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
        self.registry = Registry(settings.inference_device_adapters)
        table = Table(runtime.state("inference"), Serving, missing=ServingNotFound)
        self.mirror = mirror(table, runtime.store)
        manifests = Manifests(runtime.artifacts, settings.cache_dir / "manifests")
        host = HostCache(settings.inference_host_adapter_mb * _MB)
        disk = DiskCache(settings.cache_dir / "adapters", runtime.blobs, settings.inference_disk_adapter_mb * _MB)
        loader = Loader(manifests, disk, host, self.registry)
        self.follower = Follower(
            table=table,
            events=runtime.events,
            manifests=manifests,
            loader=loader,
            registry=self.registry,
            bests=bests,
            replica=settings.inference_replica,
            reconcile=settings.inference_reconcile_seconds,
        )
        completions = Completions(
            model=self.model,
            registry=self.registry,
            follower=self.follower,
            loader=loader,
            projects=projects,
            prompter=Prompter(settings.inference_prompt_tokens),
            load_wait=settings.inference_load_wait_seconds,
            tokens=runtime.quotas.tokens,
        )
        desk = ServingDesk(
            policies=Policies(table),
            follower=self.follower,
            registry=self.registry,
            loader=loader,
            projects=projects,
            model=self.model,
            model_id=spec.id,
            replica=settings.inference_replica,
        )
        self._collector = ReplicaCollector(
            namespace=settings.metrics_namespace,
            model=spec.id,
            loaded=lambda: completions.loaded,
            registry=self.registry,
            standings=self.follower.standings,
        )
        feedback = Feedback(Table(runtime.state("inference"), FeedbackHour, missing=NotFound))
        texts = Kept(Table(runtime.state(kept.BUCKET, kept.BOUNDS), KeptCompletion, missing=NotFound), projects)
        self._forgetting = Forgetting(texts, runtime.events)
        policies = Policies(table)

        async def forget(project: str, before: float) -> bool:
            completions.forget(project)
            projects.forget(project)  # before the policy: completions would make it another policy
            await policies.forget(project, before)
            await feedback.forget(project, before)
            return True

        self._leftovers = Leftovers(runtime.state(keyring.BUCKET), forget)
        self.services: list[Registration] = [
            (
                completion_pb2_grpc.add_CompletionServiceServicer_to_server,
                CompletionServicer(completions, spec),
                COMPLETION_SERVICE,
            ),
            (
                serving_pb2_grpc.add_ServingServiceServicer_to_server,
                ServingServicer(desk),
                "codegraft.inference.v1.ServingService",
            ),
            (
                feedback_pb2_grpc.add_FeedbackServiceServicer_to_server,
                FeedbackServicer(feedback, texts, projects, Policies(table), self.registry),
                "codegraft.inference.v1.FeedbackService",
            ),
            usage(runtime.quotas, {Kind.TOKENS: _tokens(runtime.quotas)}),
        ]

    async def run(self) -> None:
        """Loads the model, then follows policies and events until cancelled; lets texts go all the while.

        Raises:
            CodegraftError: the model cannot be loaded; completions that wait get the same error.
        """
        following = asyncio.create_task(self.follower.run())
        forgetting = [asyncio.create_task(each.run()) for each in (self._forgetting, self._leftovers)]
        metrics.register(self._collector)
        try:
            began = asyncio.get_running_loop().time()
            try:
                await stored.bring(self._spec, self._cache_dir, self._artifacts)
                model = await apart(self._load, "loading")
            except CodegraftError as error:
                self.model.set_exception(error)
                raise
            seconds = round(asyncio.get_running_loop().time() - began, 2)
            _log.info("model loaded", model=model.base.model, device=str(model.model.device), seconds=seconds)
            self.follower.model_loaded(model)
            self.model.set_result(model)
            await following
        finally:
            metrics.unregister(self._collector)
            for task in (following, *forgetting):
                task.cancel()

    def stop(self) -> None:
        """Ends the engine; what still runs ends as cancelled."""
        if self.model.done() and not self.model.cancelled() and self.model.exception() is None:
            self.model.result().engine.stop()


def _tokens(quotas: Quotas) -> Count:
    async def used(owner: str) -> int | None:
        return quotas.tokens.used(owner)

    return used


def limits(settings: InferenceSettings) -> Limits:
    """The engine's limits as the settings say."""
    return Limits(
        running=settings.inference_max_running,
        waiting=settings.inference_max_waiting,
        project_running=settings.inference_project_running or settings.inference_max_running,
        project_waiting=settings.inference_project_waiting,
        step_tokens=max(settings.inference_step_tokens, settings.inference_max_running),
        kv_tokens=settings.inference_kv_tokens,
        draft_tokens=settings.inference_speculation_tokens,
    )
