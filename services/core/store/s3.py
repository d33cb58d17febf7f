"""The object store over S3 (SeaweedFS, MinIO, AWS …), by minio-py in a bounded pool of threads."""

from __future__ import annotations

import asyncio
import io
import itertools
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, TypeVar
from xml.etree.ElementTree import ParseError

import certifi
import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from services.core import disk
from services.core.backoff import Backoff
from services.core.errors import CodegraftError, InvalidArgument, ObjectNotFound, StoreUnavailable
from services.core.rpc.context import remaining
from services.core.store.store import StoredObject
from services.core.telemetry import figures

PART_SIZE = 16 * 1024 * 1024
"""Bytes per part of a multipart upload, which is also what one upload holds in memory."""
PIPED_PART_SIZE = 8 * 1024 * 1024
PIPED_PARTS = 3
"""Parts of a stream that are on their way at once."""
THREADS = 16
"""Requests in flight at once for one store."""
RETRIES = 2
"""Further tries of a request that failed on the way; each is safe to repeat."""
ANSWER_BY = 0.9
"""Share of a call's time that a request may take: the rest is for telling the caller."""
LIST_PAGE = 1000
PRESIGNED_FOR = timedelta(minutes=5)
PROBE_KEY = ".codegraft/conditional-write"
_LOOK = "Look at its log and its disk: a full one takes no more objects (docs/runbooks/disk-full.md)."

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class S3Address:
    """Where a bucket is and how to be let in."""

    endpoint: str
    """host:port, without scheme."""
    bucket: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    secure: bool = False
    """Whether the server speaks TLS."""


class S3Store:
    """See :class:`services.core.store.store.ObjectStore`. Call :meth:`close` at the end."""

    def __init__(
        self,
        address: S3Address,
        *,
        connect_timeout: timedelta = timedelta(seconds=5),
        read_timeout: timedelta = timedelta(seconds=30),
        retries: int = RETRIES,
    ) -> None:
        self._address = address
        self._bucket = address.bucket
        self._http = urllib3.PoolManager(
            maxsize=THREADS,
            timeout=urllib3.Timeout(connect=connect_timeout.total_seconds(), read=read_timeout.total_seconds()),
            retries=urllib3.Retry(
                total=retries, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504], raise_on_status=False
            ),
            cert_reqs="CERT_REQUIRED",
            ca_certs=certifi.where(),
        )
        self._client = Minio(
            address.endpoint,
            access_key=address.access_key,
            secret_key=address.secret_key,
            secure=address.secure,
            http_client=self._http,
        )
        figures.STORE_ERRORS.labels(StoreUnavailable.reason)  # there from the start, for Prometheus to see it grow
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if if_absent:
            return await self._run(self._put_if_absent, key, data)
        await self._run(self._put_stream, key, io.BytesIO(data), len(data))
        return True

    async def put_file(self, key: str, path: Path) -> None:
        await self._run(self._put_path, key, path)

    async def put_stream(self, key: str, stream: BinaryIO, size: int) -> None:
        # A thread of its own: the stream may wait for its sender for minutes, and the pool is for requests.
        await asyncio.to_thread(self._guarded, self._put_piped, key, stream, size)

    async def get(self, key: str) -> bytes:
        target = io.BytesIO()
        await self._run(self._get_stream, key, target)
        return target.getvalue()

    async def get_file(self, key: str, path: Path) -> None:
        await self._run(self._get_path, key, path)

    async def size(self, key: str) -> int | None:
        found = await self.stat(key)
        return None if found is None else found.size

    async def stat(self, key: str) -> StoredObject | None:
        try:
            return await self._run(self._stat, key)
        except ObjectNotFound:
            return None

    async def objects(self, prefix: str) -> AsyncIterator[StoredObject]:
        found = self._client.list_objects(self._bucket, prefix=prefix, recursive=True)
        while page := await self._run(lambda: [_stored(item) for item in itertools.islice(found, LIST_PAGE)]):
            for item in page:
                yield item

    async def list(self, prefix: str) -> AsyncIterator[str]:
        async for found in self.objects(prefix):
            yield found.key

    async def delete(self, key: str) -> None:
        await self._run(self._client.remove_object, self._bucket, key)

    async def prepare(self) -> None:
        """Makes the bucket when it is not there, and proves that the server keeps conditional writes.

        A server that ignores If-None-Match would let two writers both believe that they committed an artifact.

        Raises:
            StoreUnavailable: the server does not answer, refuses, or ignores the condition.
        """
        await self._run(self._make_bucket)
        if await self.size(PROBE_KEY) is not None:  # an earlier start has proved it
            return
        if await self.put(PROBE_KEY, b"", if_absent=True) and await self.put(PROBE_KEY, b"", if_absent=True):
            await self.delete(PROBE_KEY)
            raise StoreUnavailable(
                f"the S3 server at {self._address.endpoint} ignores If-None-Match",
                field="s3_endpoint",
                hint="Use a server with conditional writes: SeaweedFS 4, a current MinIO, or AWS S3.",
            )

    async def check(self) -> None:
        """Returns when the bucket can be reached now.

        Raises:
            StoreUnavailable: it cannot.
        """
        if not await self._run(self._client.bucket_exists, self._bucket):
            raise StoreUnavailable(f"there is no bucket {self._bucket!r}", field="s3_bucket")

    def close(self) -> None:
        """Gives up the threads and connections; requests under way end on their own."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        close_connections(self._http)

    # --- in the threads ---------------------------------------------------------------------------------------------

    async def _run(self, call: Callable[..., Result], *args: object) -> Result:
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._guarded, call, *args)
        left = remaining()
        try:
            async with asyncio.timeout(None if left is None else left * ANSWER_BY):
                return await running
        except TimeoutError:
            # Else its caller would only learn that its deadline has passed. The thread ends by its own timeouts.
            raise StoreUnavailable(
                f"the S3 server at {self._address.endpoint} does not answer within the time of the call",
                field="s3_endpoint",
                retry_after=1,
            ) from None

    def _guarded(self, call: Callable[..., Result], *args: object) -> Result:
        try:
            with figures.STORE_SECONDS.time():
                return call(*args)
        except StoreUnavailable as error:
            figures.STORE_ERRORS.labels(error.reason).inc()
            raise
        except (MinioException, HTTPError, ValueError, ParseError) as error:
            told = self._translate(error)
            if not isinstance(told, ObjectNotFound):
                figures.STORE_ERRORS.labels(told.reason).inc()
            # Without its cause: a trace of urllib3's insides tells nobody anything, and may hold a signed URL.
            raise told from None

    def _put_stream(self, key: str, stream: BinaryIO, length: int) -> None:
        # One part after the other: parallelism comes from our own bounded pool, not from minio's pool per upload.
        self._client.put_object(self._bucket, key, stream, length, part_size=PART_SIZE, num_parallel_uploads=1)

    def _put_piped(self, key: str, stream: BinaryIO, length: int) -> None:
        # The one place where minio's own pool is of use: the sender must not wait while a part is on its way.
        self._client.put_object(
            self._bucket, key, stream, length, part_size=PIPED_PART_SIZE, num_parallel_uploads=PIPED_PARTS
        )

    def _put_path(self, key: str, path: Path) -> None:
        with path.open("rb") as stream:
            self._put_stream(key, stream, path.stat().st_size)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        # put_object would send If-None-Match as user metadata, that is, overwrite silently: hence a presigned URL.
        backoff = Backoff()
        for attempt in range(RETRIES + 1):
            response = self._http.request(
                "PUT",
                self._client.get_presigned_url("PUT", self._bucket, key, expires=PRESIGNED_FOR),
                body=data,
                headers={"If-None-Match": "*", "Content-Type": "application/octet-stream"},
                # A repeated request could meet its own first try and call a won race lost.
                retries=False,
            )
            if response.status == 200:
                return True
            if response.status == 412:
                return False
            if response.status != 409:  # AWS: "another conditional write is under way, try again"
                break
            time.sleep(backoff.delay(attempt))
        raise StoreUnavailable(
            f"the S3 server at {self._address.endpoint} answered {response.status} to a conditional write of {key!r}",
            hint=_LOOK,
            retry_after=1,
        )

    def _get_stream(self, key: str, target: BinaryIO) -> None:
        response = self._client.get_object(self._bucket, key)
        try:
            shutil.copyfileobj(response, target, 1024 * 1024)
        finally:
            response.close()
            response.release_conn()

    def _get_path(self, key: str, path: Path) -> None:
        with disk.writing(path.parent), path.open("wb") as target:
            self._get_stream(key, target)

    def _stat(self, key: str) -> StoredObject:
        return _stored(self._client.stat_object(self._bucket, key))

    def _make_bucket(self) -> None:
        if self._client.bucket_exists(self._bucket):
            return
        try:
            self._client.make_bucket(self._bucket)
        except S3Error as error:
            if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:  # another replica was faster
                raise

    def _translate(self, error: Exception) -> CodegraftError:
        where = f"the S3 server at {self._address.endpoint}"
        if isinstance(error, ValueError):  # minio's own check, before anything is sent
            return InvalidArgument(f"{where} cannot be asked for this: {error}", hint="Correct the bucket or key.")
        if isinstance(error, ParseError):
            return StoreUnavailable(f"{where} does not speak S3: its answer is no XML", field="s3_endpoint")
        if not isinstance(error, S3Error):
            reason = getattr(error, "reason", None) or error  # urllib3 wraps the last failure of its retries
            text = str(reason).rpartition(": ")[2] or type(reason).__name__
            return StoreUnavailable(f"{where} does not answer: {text}", field="s3_endpoint", retry_after=1)
        match error.code:
            case "NoSuchKey":
                return ObjectNotFound(f"no object {error.object_name!r}", key=error.object_name or "")
            case "NoSuchBucket":
                return StoreUnavailable(
                    f"{where} has no bucket {self._bucket!r}", field="s3_bucket", hint="Restart a service to make it."
                )
            case "AccessDenied" | "InvalidAccessKeyId" | "SignatureDoesNotMatch":
                return StoreUnavailable(
                    f"{where} refuses the credentials ({error.code})",
                    field="s3_access_key",
                    hint="Correct CODEGRAFT_S3_ACCESS_KEY and CODEGRAFT_S3_SECRET_KEY.",
                )
            case _:
                return StoreUnavailable(f"{where} refuses: {error.code}: {error.message}", hint=_LOOK, retry_after=1)


def _stored(found: Object) -> StoredObject:
    return StoredObject(found.object_name or "", found.size or 0, found.last_modified or datetime.now(UTC))


def close_connections(http: urllib3.PoolManager) -> None:
    """Closes what is idle now. ``http.clear()`` leaves that to the garbage collector, which may come much later when an
    error's trace holds the pool; and a server that is asked to stop waits for its connections.
    """
    for key in http.pools.keys():  # noqa: SIM118  no mapping: it has no iteration
        http.pools[key].close()
    http.clear()
