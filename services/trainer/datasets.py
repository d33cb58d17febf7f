"""Where a run's data comes from: the dataset as an artifact, and which one is a project's newest."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import grpc

from codegraft.scanner.v1 import scan_pb2, scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.core import names
from services.core.errors import (
    ArtifactNotFound,
    CodegraftError,
    DatasetNotFound,
    EmptyDataset,
    InvalidName,
    NoDataset,
    NotFound,
)
from services.core.rpc.status import from_rpc
from services.core.store import Artifacts

TRAIN, TEST = "train", "test"
"""Folders of the shards; datasets of an older release have one file each, with the suffix .parquet."""
_TIMEOUT = 10.0


class Newest(Protocol):
    """Knows a project's newest dataset."""

    async def newest(self, project: str) -> str:
        """Its resource name.

        Raises:
            NoDataset: the project has none.
        """
        ...


class ScannerDatasets:
    """Asks the scanner."""

    def __init__(self, scanner: grpc.aio.Channel) -> None:
        self._stub = scan_pb2_grpc.ScanServiceStub(scanner)

    async def newest(self, project: str) -> str:
        """See :class:`Newest`."""
        request = scan_pb2.GetDatasetRequest(name=f"{project}/datasets/latest")
        try:
            return str((await self._stub.GetDataset(request, timeout=_TIMEOUT)).dataset.name)
        except grpc.aio.AioRpcError as failure:
            error: CodegraftError = from_rpc(failure)
        if isinstance(error, NotFound):
            raise NoDataset(
                f"{project} has no dataset", field="dataset", hint="Scan a snapshot of the project first."
            ) from None
        raise error


async def find(artifacts: Artifacts, newest: Newest, project: str, dataset: str) -> DatasetManifest:
    """The manifest of a dataset; of the project's newest one when none is named.

    Raises:
        InvalidName: the name is not one of the project's datasets.
        NoDataset: none is named, and there is none.
        DatasetNotFound: there is no such dataset.
        EmptyDataset: nothing to train on, or nothing to measure it by.
    """
    names.parse(names.PROJECT, project, field="parent")
    if dataset:
        names.parse(names.DATASET, dataset, field="dataset")
        if names.project_of(dataset) != project:
            raise InvalidName(
                f"{dataset} is of another project than {project}", field="dataset", hint="Name one of this project."
            )
    name = dataset or await newest.newest(project)
    try:
        manifest = await artifacts.manifest(name, DatasetManifest)
    except ArtifactNotFound:
        raise DatasetNotFound(f"{name} does not exist", field="dataset", hint="See ListDatasets.") from None
    for part, count in (("train", manifest.train.files), ("test", manifest.test.files)):
        if not count:
            raise EmptyDataset(
                f"the {part} part of {name} has no file",
                field="dataset",
                hint="Add sources, or files marked as test, and scan again.",
            )
    return manifest


async def fetch(artifacts: Artifacts, manifest: DatasetManifest) -> tuple[Path, Path]:
    """Local paths of the train and the test part, verified: folders of shards."""
    folder = await artifacts.fetch(manifest.name, manifest.files)
    train, test = (folder / part if (folder / part).is_dir() else folder / f"{part}.parquet" for part in (TRAIN, TEST))
    return train, test
