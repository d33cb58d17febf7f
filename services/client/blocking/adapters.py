# Made by make_blocking.py from services/client/aio; change it there.
"""Adapters as files: out of the house and into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from codegraft.common.v1.job_pb2 import Progress
from codegraft.trainer.v1 import adapter_pb2, adapter_pb2_grpc, run_pb2
from services.client import retry
from services.client.blocking.caller import Caller, new_request_id
from services.client.blocking.ingest import project_name
from services.client.content import Content, announced, chunks
from services.client.incoming import IncomingFiles
from services.client.streams import Stream
from services.core.errors import CodegraftError

FILES = ("adapter_model.safetensors", "adapter_config.json")


class Adapters:
    """Checkpoints as files."""

    def __init__(self, channel: grpc.Channel, uploads: grpc.Channel, caller: Caller) -> None:
        self._stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._uploads = adapter_pb2_grpc.AdapterServiceStub(uploads)
        self._caller = caller

    def download(
        self,
        name: str,
        folder: str | Path,
        *,
        format: adapter_pb2.AdapterFormat = adapter_pb2.ADAPTER_FORMAT_PEFT,
        gguf_type: adapter_pb2.GgufType = adapter_pb2.GGUF_TYPE_UNSPECIFIED,
        overwrite: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> adapter_pb2.DownloadHeader:
        """Writes a checkpoint's files into a folder, which has all of them or none; says what they are.

        A broken connection is taken up again where it stopped.

        Args:
            name: full name; the id "best" names the run's best one.
            format: the adapter alone, merged into its base model, or that as one GGUF file.
            overwrite: whether files of the same names in the folder are replaced.
            on_progress: called now and then, with bytes converted or arrived.

        Raises:
            FailedPrecondition: the folder holds something, and overwrite is not given.
            NotSupported: the model cannot be converted so.
            DigestMismatch: what arrived is not what was announced.
            CheckpointNotFound, BaseModelMismatch, ResourceExhausted.
        """
        incoming = IncomingFiles(Path(folder), overwrite=overwrite)
        request = adapter_pb2.DownloadCheckpointRequest(name=name, format=format, gguf_type=gguf_type)
        header, failures = adapter_pb2.DownloadHeader(), 0
        try:
            while True:
                request.offset, fits = incoming.offset, True
                try:
                    for message in self._caller.stream(self._stub.DownloadCheckpoint, request, _itself):
                        match message.WhichOneof("part"):
                            case "progress":
                                on_progress(message.progress)
                            case "header":
                                header = message.header
                                fits = incoming.expect(header.files)
                                if not fits:
                                    break
                            case "chunk":
                                chunk, failures = message.chunk, 0
                                incoming.write(chunk.offset, chunk.data)
                                on_progress(_arrived(header, incoming.offset))
                    if fits:
                        incoming.finish()
                        return header
                    continue  # a conversion that came out otherwise this time: from its start
                except CodegraftError as failure:
                    error = failure
                if failures + 1 >= retry.ATTEMPTS or not retry.will_pass(error):
                    raise error
                time.sleep(retry.delay(error, failures))
                failures += 1
        finally:
            incoming.discard()

    def stream(
        self,
        name: str,
        *,
        format: adapter_pb2.AdapterFormat = adapter_pb2.ADAPTER_FORMAT_PEFT,
        gguf_type: adapter_pb2.GgufType = adapter_pb2.GGUF_TYPE_UNSPECIFIED,
    ) -> Stream[adapter_pb2.DownloadCheckpointResponse]:
        """What :meth:`download` writes, for callers who pass it on: progress, a header, chunks. They check the digests.

        It is not repeated. Raises what :meth:`download` does.
        """
        request = adapter_pb2.DownloadCheckpointRequest(name=name, format=format, gguf_type=gguf_type)
        return self._caller.stream(self._stub.DownloadCheckpoint, request, _itself)

    def upload(
        self,
        project: str,
        folder: str | Path,
        *,
        base_model: str = "",
        title: str = "",
        request_id: str = "",
    ) -> run_pb2.Run:
        """Uploads an adapter in PEFT's format that was trained elsewhere; serving can be pinned to its checkpoint.

        Args:
            folder: with adapter_model.safetensors and adapter_config.json; other files in it are left alone.
            base_model: what it was trained on; empty means the deployment's default.
            request_id: idempotency key; a fresh one when empty.

        Raises:
            InvalidArgument: a file cannot be read.
            AdapterRejected: it is not plain LoRA, or does not fit the base model.
            BaseModelMismatch, ModelNotFound, LimitExceeded, UploadMismatch.
        """
        contents = [Content.of(Path(folder) / file) for file in FILES]
        header = adapter_pb2.ImportHeader(
            parent=project_name(project),
            base_model=base_model,
            title=title,
            request_id=request_id or new_request_id(),
            files=announced(contents),
        )
        failures = 0
        while True:
            try:
                return (self._caller.upload(self._uploads.ImportAdapter, _parts(header, contents))).run
            except CodegraftError as failure:
                error = failure
            if failures + 1 >= retry.ATTEMPTS or not retry.will_pass(error):
                raise error
            time.sleep(retry.delay(error, failures))
            failures += 1


def _parts(header: adapter_pb2.ImportHeader, contents: list[Content]) -> Iterator[adapter_pb2.ImportAdapterRequest]:
    yield adapter_pb2.ImportAdapterRequest(header=header)
    for chunk in chunks(contents):
        yield adapter_pb2.ImportAdapterRequest(chunk=chunk)


def _arrived(header: adapter_pb2.DownloadHeader, offset: int) -> Progress:
    total = sum(file.size for file in header.files)
    return Progress(done=offset, total=total, unit="bytes", message="downloading")


def _itself(message: adapter_pb2.DownloadCheckpointResponse) -> adapter_pb2.DownloadCheckpointResponse:
    return message
