"""What the services may do at NATS and at the object store: all that they need, and nothing of the others'.

Only looks, and writes of its own probe objects: a permission that should not be there must do no harm when it is tried.
In a local stack every service's credentials are at hand; elsewhere those in the environment are tried, if they are a
service's.
"""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import Iterator

import nats
import nats.errors
import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from nats.aio.client import Client
from nats.js.api import Header
from urllib3.exceptions import HTTPError

from services.cli.control.installation import Installation
from services.cli.doctor.check import Check, failed, ok
from services.cli.local.files import ServiceCredentials
from services.cli.local.permissions import KEYS, ROOM, SERVICES
from services.core.config import CoreSettings
from services.core.nats_connection import close_client
from services.core.quota.nats import PREFIX as USAGE
from services.core.runtime import nats_tls
from services.core.state import mirror

_TIMEOUT = 5.0
"""Seconds for an answer: a busy server must not look like one that refuses."""
_REFUSAL = 1.0
"""Seconds for what the server says against us to be read."""
_HINT_NATS = "Make the servers' users anew: python -m services.cli.local.permissions prints them."
_HINT_S3 = "Give each service an identity of its own, as deploy/helm/codegraft/README.md has them."


async def check(place: Installation) -> list[Check]:
    """Of every service whose credentials are known, and of a caller without any."""
    settings = place.settings
    known = dict(place.services)
    if not known and settings.nats_user in SERVICES:
        known[settings.nats_user] = ServiceCredentials(
            settings.nats_password.get_secret_value(),
            settings.s3_access_key.get_secret_value(),
            settings.s3_secret_key.get_secret_value(),
            api_key="",
        )
    checks = [await _check_closed(settings)]
    for name, credentials in known.items():
        checks.append(await _check_nats(settings, name, credentials.nats_password))
        checks.append(await asyncio.to_thread(_check_s3, settings, name, credentials))
    return checks


async def _check_closed(settings: CoreSettings) -> Check:
    problem = await _try_nats(settings, "", "", [], [])
    if problem.startswith("cannot log in"):
        return ok("closed NATS", "a caller without a password is refused")
    return failed("closed NATS", "anybody is let in", "Give the servers users with passwords.")


async def _check_nats(settings: CoreSettings, name: str, password: str) -> Check:
    title = f"NATS as {name}"
    others = [f"KV_{other}" for other in SERVICES if other != name]
    problem = await _try_nats(settings, name, password, [f"KV_{name}", KEYS, "EVENTS"], others)
    return failed(title, problem, _HINT_NATS) if problem else ok(title, "its own state, and nobody else's")


async def _try_nats(settings: CoreSettings, user: str, password: str, own: list[str], others: list[str]) -> str:
    """What is wrong; empty when the streams in ``own`` can be looked at, and those in ``others`` cannot."""
    refused: list[str] = []

    async def on_error(error: Exception) -> None:
        refused.append(str(error).lower())

    try:
        client = await nats.connect(
            settings.nats_url.split(",")[0].strip(),
            user=user or None,
            password=password or None,
            tls=nats_tls(settings),
            inbox_prefix=f"_INBOX.{user}" if user else "_INBOX",
            connect_timeout=int(_TIMEOUT),
            allow_reconnect=False,
            error_cb=on_error,
        )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        return f"cannot log in: {error or type(error).__name__}"
    try:
        for stream in own:
            try:
                await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=_TIMEOUT)
            except (nats.errors.Error, TimeoutError):
                return f"may not look at {stream}"
        if others and (allowed := await _allowed(client, others, refused)):
            return allowed
        return await _silenced(client, user, refused) or await _homeless(client, user) if own else ""
    except (nats.errors.Error, OSError, TimeoutError) as error:
        return f"it does not answer: {error or type(error).__name__}"
    finally:
        await close_client(client)


async def _silenced(client: Client, user: str, refused: list[str]) -> str:
    """What is wrong where the service may not tell or hear how much is used of quotas; empty when it may."""
    await client.subscribe(f"{USAGE}*")
    await client.publish(f"{USAGE}{user}", b"")  # which says nothing
    for _ in range(2):  # the client's first PING overtakes what waits to be sent; what is refused comes before the PONG
        await client.flush(timeout=int(_TIMEOUT))
    return f"may not exchange what is used on {USAGE}{user}" if any(f'"{USAGE}' in line for line in refused) else ""


async def _homeless(client: Client, user: str) -> str:
    """What is wrong where a service that stores for projects may not claim room for it; empty when it may."""
    if not SERVICES[user].writes_objects:
        return ""
    try:
        # Under a revision that is not there, so nothing is written: that is JetStream's answer, to whoever may ask.
        last = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(2**62)}
        await client.request(f"{ROOM}doctor", b"", timeout=_TIMEOUT, headers=last)
    except (nats.errors.Error, TimeoutError):
        return f"may not claim room for what it stores, on {ROOM}>"
    return ""


async def _allowed(client: Client, others: list[str], refused: list[str]) -> str:
    """What of the others' can be reached; empty when all of it is refused.

    Args:
        refused: what the server says against us, as it comes.
    """
    wanted = {f"$js.api.stream.info.{stream}".lower(): f"may look at {stream}" for stream in others}
    for stream in others:
        await client.publish(f"$JS.API.STREAM.INFO.{stream}", b"", reply=client.new_inbox())
    wanted['subscription to "$kv.>"'] = "may listen to everybody's state"
    await client.subscribe("$KV.>")
    await client.flush(timeout=int(_TIMEOUT))
    deadline = asyncio.get_running_loop().time() + _REFUSAL
    while left := [told for sign, told in wanted.items() if not any(sign in line for line in refused)]:
        if asyncio.get_running_loop().time() > deadline:
            return left[0]
        await asyncio.sleep(0.01)
    return ""


def _check_s3(settings: CoreSettings, name: str, credentials: ServiceCredentials) -> Check:
    client = Minio(
        settings.s3_endpoint,
        access_key=credentials.s3_access_key,
        secret_key=credentials.s3_secret_key,
        secure=settings.s3_secure,
        http_client=urllib3.PoolManager(timeout=5.0, retries=False),
    )
    title = f"object store as {name}"
    try:
        problem = next(_s3_problems(client, settings.s3_bucket, name, writes=SERVICES[name].writes_objects), "")
    except (MinioException, HTTPError) as error:
        problem = f"it does not answer: {error}"
    return failed(title, problem, _HINT_S3) if problem else ok(title, "reads, and writes no more than it needs")


def _s3_problems(client: Minio, bucket: str, name: str, *, writes: bool) -> Iterator[str]:
    probe = f"doctor/{secrets.token_hex(8)}"
    try:
        next(iter(client.list_objects(bucket, prefix=probe)), None)
    except S3Error as error:
        yield f"may not read: {error.code}"
    if not _may_write(client, bucket, f".codegraft/{probe}"):
        yield "may not write below .codegraft/, which it does at its start"
    if not _may_write(client, bucket, f"{mirror.ROOT}{name}/{probe}"):
        yield f"may not write below {mirror.ROOT}{name}/, where copies of its records go"
    if _may_write(client, bucket, probe) is not writes:
        yield "may not write" if writes else "may write what it only reads"


def _may_write(client: Minio, bucket: str, key: str) -> bool:
    try:
        client.put_object(bucket, key, io.BytesIO(b"x"), 1)
    except S3Error as error:
        if error.code == "AccessDenied":
            return False
        raise
    client.remove_object(bucket, key)
    return True
