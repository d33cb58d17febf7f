"""Scans, their verdicts, and datasets."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from codegraft.scanner.v1 import dataset_pb2, scan_pb2, scan_pb2_grpc, verdict_pb2
from services.client.aio.caller import Caller, new_request_id
from services.client.aio.ingest import project_name
from services.client.jobs import raise_failure


class Scans:
    """Jobs that give every file of a snapshot a verdict and make a dataset of the accepted ones."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = scan_pb2_grpc.ScanServiceStub(channel)
        self._caller = caller

    async def create(
        self, project: str, snapshot: str, settings: scan_pb2.ScanSettings | None = None, *, request_id: str = ""
    ) -> scan_pb2.Scan:
        """Queues a scan.

        Args:
            snapshot: full name of the snapshot.
            settings: how to filter; unset fields take their defaults.
            request_id: idempotency key; a fresh one when empty.

        Raises:
            SnapshotNotFound, InvalidArgument, InvalidMask, ModelNotFound.
        """
        request = scan_pb2.CreateScanRequest(
            parent=project_name(project),
            snapshot=snapshot,
            settings=settings,
            request_id=request_id or new_request_id(),
        )
        return (await self._caller.unary(self._stub.CreateScan, request, repeat=True)).scan

    async def get(self, name: str) -> scan_pb2.Scan:
        """One scan by its full name. Raises ScanNotFound."""
        return (await self._caller.unary(self._stub.GetScan, scan_pb2.GetScanRequest(name=name), repeat=True)).scan

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[scan_pb2.Scan]:
        """Every scan of a project, newest first."""
        request = scan_pb2.ListScansRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListScans, request):
            for scan in page.scans:
                yield scan

    async def watch(self, name: str) -> AsyncIterator[scan_pb2.Scan]:
        """The scan as it is now, then after every change; ends after its final state."""
        async for message in self._caller.follow(self._stub.WatchScan, scan_pb2.WatchScanRequest(name=name)):
            yield message.scan

    async def watch_all(self, project: str) -> AsyncIterator[scan_pb2.WatchScansResponse]:
        """Every scan of a project in no order, then each that is new, changes or is removed, without end."""
        request = scan_pb2.WatchScansRequest(parent=project_name(project))
        async for message in self._caller.follow(self._stub.WatchScans, request):
            yield message

    async def wait(self, name: str) -> scan_pb2.Scan:
        """Waits for the end.

        Raises:
            CodegraftError: the scan failed or was cancelled; the class that belongs to its reason, with its hint.
        """
        async for _ in self.watch(name):
            pass
        scan = await self.get(name)
        raise_failure(scan.status, name)
        return scan

    async def cancel(self, name: str) -> scan_pb2.Scan:
        """Asks a scan to stop."""
        request = scan_pb2.CancelScanRequest(name=name)
        return (await self._caller.unary(self._stub.CancelScan, request, repeat=True)).scan

    async def verdicts(
        self, name: str, verdict_filter: verdict_pb2.VerdictFilter | None = None, page_size: int = 1000
    ) -> AsyncIterator[verdict_pb2.Verdict]:
        """The verdicts of a scan that match the filter, by source and path."""
        request = scan_pb2.ListVerdictsRequest(parent=name, filter=verdict_filter, page_size=page_size)
        async for page in self._caller.pages(self._stub.ListVerdicts, request):
            for verdict in page.verdicts:
                yield verdict

    async def verdict_page(
        self,
        name: str,
        verdict_filter: verdict_pb2.VerdictFilter | None = None,
        *,
        page_size: int = 0,
        page_token: str = "",
    ) -> scan_pb2.ListVerdictsResponse:
        """One page of :meth:`verdicts`, with the token of the next one and how many verdicts match in all.

        Raises:
            ScanNotFound, InvalidMask, InvalidPageSize, InvalidPageToken.
        """
        request = scan_pb2.ListVerdictsRequest(
            parent=name, filter=verdict_filter, page_size=page_size, page_token=page_token
        )
        return await self._caller.unary(self._stub.ListVerdicts, request, repeat=True)


class Datasets:
    """What scans accepted, split into train and test."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = scan_pb2_grpc.ScanServiceStub(channel)
        self._caller = caller

    async def get(self, name: str) -> dataset_pb2.Dataset:
        """One dataset by its full name; the id "latest" names the newest. Raises DatasetNotFound."""
        request = scan_pb2.GetDatasetRequest(name=name)
        return (await self._caller.unary(self._stub.GetDataset, request, repeat=True)).dataset

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[dataset_pb2.Dataset]:
        """Every dataset of a project, newest first."""
        request = scan_pb2.ListDatasetsRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListDatasets, request):
            for dataset in page.datasets:
                yield dataset
