"""ScanService: requests in, tables and artifacts, responses out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.common.v1.split_pb2 import Split
from codegraft.scanner.v1 import scan_pb2 as pb
from codegraft.scanner.v1 import scan_pb2_grpc, verdict_pb2
from codegraft.scanner.v1.dataset_pb2 import Dataset
from services.core import names
from services.core.auth.caller import current
from services.core.errors import DatasetNotFound, InvalidArgument, InvalidName, RequestIdReused, ResourceExists
from services.core.jobs import is_final, new_status, request_cancel
from services.core.quota.places import Places
from services.core.quota.quotas import owners
from services.core.runtime import Runtime
from services.core.state import Table
from services.scanner import rules, snapshot, verdict_log, worker
from services.scanner.config import ScannerSettings
from services.scanner.verdict import Reason, Verdict

KIND = "scan"
"""Of its jobs."""
LATEST = "latest"

Context = grpc.aio.ServicerContext[Any, Any]


class ScanServicer(scan_pb2_grpc.ScanServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(
        self,
        runtime: Runtime,
        settings: ScannerSettings,
        scans: Table[pb.Scan],
        datasets: Table[Dataset],
        places: Places,
    ) -> None:
        self._runtime = runtime
        self._places = places
        self._settings = settings
        self._scans = scans
        self._datasets = datasets

    async def CreateScan(self, request: pb.CreateScanRequest, context: Context) -> pb.CreateScanResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        if not request.snapshot:
            raise InvalidName(
                "snapshot is empty",
                field="snapshot",
                hint="Take one with SnapshotService.CreateSnapshot and give its name.",
            )
        names.parse(names.SNAPSHOT, request.snapshot, field="snapshot")
        if names.project_of(request.snapshot) != request.parent:
            raise InvalidName(
                f"{request.snapshot} is of another project than {request.parent}",
                field="snapshot",
                hint="Scan a snapshot of the same project.",
            )
        settled = rules.resolve(request.settings, default_model=self._settings.scanner_model)
        await snapshot.manifest(self._runtime.artifacts, request.snapshot)
        scan = pb.Scan(
            name=f"{request.parent}/scans/{names.new_id('s', request_id=request.request_id, scope=request.parent)}",
            snapshot=request.snapshot,
            settings=rules.to_settings(settled),
            status=new_status(),
            request_id=request.request_id,
            creator=current().subject,
        )
        if (there := await self._scans.find(scan.name)) is None:
            await self._runtime.storage.check(request.parent)
            async with self._places.claim(owners(current(), request.parent), scan.name):
                try:
                    there = scan = await self._scans.create(scan)
                except ResourceExists:
                    there = await self._scans.get(scan.name)
        if (there.snapshot, there.settings) != (scan.snapshot, scan.settings):
            raise RequestIdReused(
                f"request_id {request.request_id!r} came before with another snapshot or other settings",
                field="request_id",
                hint="Use a new request_id for a new request.",
            )
        scan = there
        if not is_final(scan.status):
            await self._runtime.jobs.submit(KIND, scan.name)
        return pb.CreateScanResponse(scan=scan)

    async def GetScan(self, request: pb.GetScanRequest, context: Context) -> pb.GetScanResponse:
        names.parse(names.SCAN, request.name)
        return pb.GetScanResponse(scan=await self._scans.get(request.name))

    async def ListScans(self, request: pb.ListScansRequest, context: Context) -> pb.ListScansResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        found, token = await self._scans.page(request.parent, request.page_size, request.page_token, newest_first=True)
        return pb.ListScansResponse(scans=found, next_page_token=token)

    async def WatchScan(self, request: pb.WatchScanRequest, context: Context) -> AsyncIterator[pb.WatchScanResponse]:
        names.parse(names.SCAN, request.name)
        async for scan in self._scans.watch(request.name):
            yield pb.WatchScanResponse(scan=scan)
            if is_final(scan.status):
                return

    async def WatchScans(self, request: pb.WatchScansRequest, context: Context) -> AsyncIterator[pb.WatchScansResponse]:
        names.parse(names.PROJECT, request.parent, field="parent")
        async for change in self._scans.follow(request.parent + "/"):
            if change.message is None:
                yield pb.WatchScansResponse(removed=change.name)
            else:
                yield pb.WatchScansResponse(scan=change.message)

    async def CancelScan(self, request: pb.CancelScanRequest, context: Context) -> pb.CancelScanResponse:
        names.parse(names.SCAN, request.name)
        scan = await self._scans.mutate(request.name, lambda scan: request_cancel(scan.status))
        return pb.CancelScanResponse(scan=scan)

    async def ListVerdicts(self, request: pb.ListVerdictsRequest, context: Context) -> pb.ListVerdictsResponse:
        names.parse(names.SCAN, request.parent, field="parent")
        scan = await self._scans.get(request.parent)
        file = await worker.verdicts_file(self._runtime, scan.verdicts) if scan.verdicts else None
        page = await asyncio.to_thread(
            verdict_log.page, file, request.parent, _filter(request.filter), request.page_size, request.page_token
        )
        return pb.ListVerdictsResponse(
            verdicts=[_verdict(verdict) for verdict in page.verdicts],
            next_page_token=page.next_page_token,
            total_count=page.total,
        )

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        ids = names.parse(names.DATASET, request.name)
        name = request.name
        if ids["dataset"] == LATEST:
            name = await self._latest(names.project_of(name))
        return pb.GetDatasetResponse(dataset=await self._datasets.get(name))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        found, token = await self._datasets.page(
            request.parent, request.page_size, request.page_token, newest_first=True
        )
        return pb.ListDatasetsResponse(datasets=found, next_page_token=token)

    async def _latest(self, project: str) -> str:
        """The dataset of the scan that succeeded last. Not the one made last: a scan may find an older one again."""
        ended = [scan for scan in await self._scans.all(project + "/") if scan.status.state == JOB_STATE_SUCCEEDED]
        if not ended:
            raise DatasetNotFound(
                f"{project} has no dataset yet",
                field="name",
                hint="Scan a snapshot first, with ScanService.CreateScan.",
            )
        return max(ended, key=lambda scan: (scan.status.end_time.ToNanoseconds(), scan.name)).dataset


def _filter(wanted: verdict_pb2.VerdictFilter) -> verdict_log.Filter:
    known = {reason.value: reason.name for reason in Reason}
    if unknown := [reason for reason in wanted.reasons if reason not in known]:
        raise InvalidArgument(
            f"there is no reason {unknown[0]}", field="filter.reasons", hint="Use the values of VerdictReason."
        )
    return verdict_log.Filter(
        accepted=wanted.accepted if wanted.HasField("accepted") else None,
        reasons=frozenset(known[reason] for reason in wanted.reasons),
        languages=frozenset(wanted.languages),
        path=wanted.path,
        min_loss=wanted.min_loss if wanted.HasField("min_loss") else None,
        max_loss=wanted.max_loss if wanted.HasField("max_loss") else None,
    )


def _verdict(verdict: Verdict) -> verdict_pb2.Verdict:
    values = asdict(verdict) | {"detail": verdict.detail}
    # Names are the same, and so are the numbers of the reasons; None is an absent loss.
    values["reason"] = Reason[verdict.reason].value
    values["reasons"] = [Reason[reason].value for reason in verdict.reasons]
    values["split"] = Split.Value(f"SPLIT_{verdict.split or 'UNSPECIFIED'}")
    return verdict_pb2.Verdict(**values)
