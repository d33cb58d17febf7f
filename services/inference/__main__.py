"""Runs the inference service: health and queue first, then the model."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from services.core import garbage
from services.core.auth import keyring
from services.core.models import catalogue
from services.core.rpc import server
from services.core.rpc.client import channel
from services.core.runtime import Runtime, leave, run
from services.inference.assembly import COMPLETION_SERVICE, Replica, limits
from services.inference.config import InferenceSettings
from services.inference.peers import IngestProjects, TrainerBests

if TYPE_CHECKING:
    from services.inference.model import LoadedModel


async def main(settings: InferenceSettings) -> None:
    """Serves until a signal."""
    spec = catalogue.find(settings.inference_model)

    def load() -> LoadedModel:
        with garbage.unsearched():
            from services.inference import model  # imports torch: seconds in which calls are answered already

            loaded = model.load(
                spec,
                settings.cache_dir,
                limits(settings),
                threads=settings.inference_threads,
                max_rank=settings.inference_max_rank,
                kind=settings.inference_weights,
            )
        # Half a million objects that stay, but for a fiftieth: to look through them, once or again and again, takes 0.3
        # s, in which no step is computed and nothing answered.
        gc.freeze()
        return loaded

    async with Runtime.open("inference", settings) as runtime:
        replica = Replica(
            runtime,
            settings,
            spec,
            bests=TrainerBests(channel(settings.trainer_address, settings)),
            projects=IngestProjects(channel(settings.ingest_address, settings)),
            load=load,
        )
        try:
            await server.serve(
                settings,
                replica.services,
                keys=runtime.state(keyring.BUCKET),
                audit=runtime.audit,
                quotas=runtime.quotas,
                background=[replica.run, replica.mirror.run],
                serving_after={COMPLETION_SERVICE: replica.model},
            )
        finally:
            replica.stop()


if __name__ == "__main__":
    leave(run("inference", InferenceSettings, main))
