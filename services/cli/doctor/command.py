"""The command: every check in its order, printed, and summed up in the exit code."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from services.cli.control.installation import URL_VARIABLE, Installation, opened
from services.cli.doctor import clock, gateway, machine, permissions, services, store, streams
from services.cli.doctor.check import Check, Result, failed, ok
from services.cli.local.files import DataFolder, StackState
from services.cli.output import ExitCode, Json, out, print_json
from services.cli.stack import Data
from services.client.addresses import folder_of
from services.core.errors import CodegraftError

Monitor = Annotated[
    str,
    typer.Option(
        "--nats-monitor",
        envvar="CODEGRAFT_NATS_MONITOR",
        help="URL of NATS's monitoring port (http://HOST:8222), which tells how it writes to disk.",
        show_default=False,
    ),
]

Gateway = Annotated[
    str,
    typer.Option(
        "--gateway",
        envvar="CODEGRAFT_GATEWAY_URL",
        help="Address of the gateway as editors have it (https://HOST:PORT); of a local stack it is known.",
        show_default=False,
    ),
]


def doctor(data: Data = None, nats_monitor: Monitor = "", gateway_url: Gateway = "", json: Json = False) -> None:
    """Check an installation, and say how to mend what is wrong. Exits with 1 when something is broken.

    Without settings of another one it looks at this machine, the data folder, and the local stack if that runs. With
    CODEGRAFT_NATS_URL, CODEGRAFT_NATS_USER and the other settings of NATS, S3 and the services' addresses it looks at
    the installation that they name, as far as these credentials may: clocks, versions, how NATS writes to disk, streams
    and buckets, who is let in, what each service may do, the gateway and its certificate. It changes nothing but probe
    objects below .codegraft/, records/ and doctor/ in the bucket, which it removes.

    Example: codegraft doctor --nats-monitor http://codegraft-nats-0.codegraft-nats:8222 --gateway https://code.example
    """
    checks = list(_checks(data, nats_monitor.rstrip("/"), gateway_url.rstrip("/")))
    if json:
        print_json([asdict(check) for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            out.print(f"{check.result.value:8} {check.name:{width}} {check.found}")
            if check.hint:
                out.print(f"{'':{width + 9}} {check.hint}")
    if any(check.result is Result.FAILED for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def _checks(data: Path | None, monitor: str, url: str) -> Iterator[Check]:
    if data is None and os.environ.get(URL_VARIABLE):
        yield from asyncio.run(_installation(replace(Installation.find(), gateway=url), monitor))
        return
    folder = DataFolder(folder_of(data))
    yield from machine.machine(folder.root)
    yield from machine.installation()
    yield from machine.data_folder(folder)
    yield from machine.running(folder)
    info = folder.info()
    if info.state is StackState.READY:
        place = Installation.local(folder, info)
        yield from asyncio.run(_installation(replace(place, gateway=url or place.gateway), monitor))


async def _installation(place: Installation, monitor: str) -> list[Check]:
    """What the services, NATS and the object store say; those that do not answer are told as that."""
    told = await services.told(place)
    releases, found = services.versions(told), services.check(place, told)
    if place.gateway:
        checks, release = await asyncio.to_thread(gateway.check, place, place.gateway)
        found += checks
        releases |= {gateway.NAME: release} if release else {}
    else:
        found.append(ok(gateway.NAME, "none is named: --gateway"))
    found += [*services.judge(releases), *clock.check_services(told), *await clock.check_store(place)]
    try:
        async with opened(place) as control:
            found += await clock.check_nats(control)
            found += await streams.check(control, place.settings.nats_replicas)
            found += await asyncio.to_thread(streams.check_sync, place, monitor)
            found += await asyncio.to_thread(store.check, place)
    except CodegraftError as error:
        found.append(failed("connections", error.message, error.hint or "Look at the server's log."))
        return found
    found += await services.check_access(place)
    return found + await permissions.check(place)
