"""The parts of one trainer process, wired together over its connections."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence

from codegraft.common.v1.job_pb2 import JobState
from codegraft.event.v1.events_pb2 import RunChanged
from codegraft.trainer.v1 import adapter_pb2_grpc, run_pb2_grpc
from services.core.auth import keyring
from services.core.jobs import JobRunner
from services.core.jobs.announcer import announce
from services.core.jobs.workers import Workers
from services.core.leftovers import Leftovers
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.quota.usage import usage
from services.core.rpc.server import Background, Registration
from services.core.runtime import Runtime
from services.trainer.adapter_servicer import AdapterServicer
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.launch.elastic import ElasticLauncher
from services.trainer.launch.launcher import Launcher
from services.trainer.launch.thread import ThreadLauncher
from services.trainer.leftovers import RunLeftovers
from services.trainer.model_servicer import ModelServicer
from services.trainer.planning import machine
from services.trainer.records import BUCKET, Tables
from services.trainer.servicer import KIND, RunServicer
from services.trainer.worker import RunWorker

CHANGED = "codegraft.trainer.run.changed.v1"


class Trainer:
    """What a process serves, and what it does beside that.

    Attributes:
        services: for services/core/rpc/server.
        background: likewise: the workers, one a device, the announcer of runs' states, and what lets go of deleted
            projects' runs.
        tables: its records.
    """

    def __init__(self, runtime: Runtime, settings: TrainerSettings, newest: Newest) -> None:
        self.tables = tables = Tables.of(runtime.state(BUCKET))
        launcher: Launcher = (
            ThreadLauncher() if settings.trainer_launcher == "thread" else ElasticLauncher(settings.trainer_processes)
        )
        me = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"

        # One runner for the devices of a run: two runs there would only wait for each other, and share the memory.
        groups = machine.devices(settings.trainer_device, settings.trainer_devices, settings.trainer_processes)
        runners = [
            JobRunner(
                KIND,
                tables.runs,
                runtime.jobs,
                RunWorker(runtime, settings, tables, newest, launcher, devices).handle,
                worker_id=f"{me}-{number}",
                lease=settings.job_lease,
            )
            for number, devices in enumerate(groups[: settings.trainer_workers])
        ]
        workers = Workers(runtime.state(BUCKET), runners, settings.job_lease)
        self.background: Sequence[Background] = [
            *(runner.run for runner in runners),
            workers.run,
            lambda: announce(KIND, tables.runs, runtime.events, CHANGED, _changed),
            Leftovers(runtime.state(keyring.BUCKET), RunLeftovers(tables, runtime.store).forget).run,
        ]
        room = places(runtime.quotas, Kind.RUNS, runtime.state(BUCKET), tables.runs)
        self.services: Sequence[Registration] = [
            (
                run_pb2_grpc.add_RunServiceServicer_to_server,
                RunServicer(runtime, settings, tables, newest, room),
                "codegraft.trainer.v1.RunService",
            ),
            (
                run_pb2_grpc.add_ModelServiceServicer_to_server,
                ModelServicer(runtime, settings),
                "codegraft.trainer.v1.ModelService",
            ),
            (
                adapter_pb2_grpc.add_AdapterServiceServicer_to_server,
                AdapterServicer(runtime, settings, tables),
                "codegraft.trainer.v1.AdapterService",
            ),
            usage(runtime.quotas, {Kind.RUNS: room.used}),
            workers.service(),
        ]


def _changed(name: str, state: JobState) -> RunChanged:
    return RunChanged(run=name, state=state)
