"""NATS and S3 of their own, for benchmarks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from services.cli.local import nats, ports, s3
from services.core.store.s3 import S3Address

_GRACE = timedelta(seconds=10)


@contextmanager
def servers(folder: Path) -> Iterator[tuple[dict[str, str], S3Address]]:
    """Starts both on free ports and ends them.

    Args:
        folder: of their files.

    Yields:
        The environment in which a service finds them, and the store's address.
    """
    chosen = ports.choose(["nats", "s3"], {})
    password, key = secrets.token_urlsafe(16), secrets.token_hex(10)
    address = S3Address(f"{ports.HOST}:{chosen['s3']}", "bench", key, secrets.token_urlsafe(32))
    server = nats.start(folder / "nats", log=folder / "nats.log", port=chosen["nats"], user="bench", password=password)
    try:
        objects = s3.start(
            folder / "s3",
            log=folder / "s3.log",
            port=chosen["s3"],
            access_key=address.access_key,
            secret_key=address.secret_key,
            bucket=address.bucket,
        )
        try:
            environment = {
                **os.environ,
                "CODEGRAFT_NATS_URL": f"nats://{ports.HOST}:{chosen['nats']}",
                "CODEGRAFT_NATS_USER": "bench",
                "CODEGRAFT_NATS_PASSWORD": password,
                "CODEGRAFT_S3_ENDPOINT": address.endpoint,
                "CODEGRAFT_S3_ACCESS_KEY": address.access_key,
                "CODEGRAFT_S3_SECRET_KEY": address.secret_key,
                "CODEGRAFT_S3_BUCKET": address.bucket,
                "CODEGRAFT_LOG_LEVEL": "warning",
                "CODEGRAFT_AUTH": "off",
            }
            yield environment, address
        finally:
            objects.stop(_GRACE)
    finally:
        server.stop(_GRACE)
