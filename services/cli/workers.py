"""``codegraft workers``: who works on scans and runs."""

from __future__ import annotations

from services.cli.connect import connect
from services.cli.output import Json, print_json, print_table


def workers(json: Json = False) -> None:
    """List the workers of all replicas, idle ones too: which jobs each takes, the one it is at, since when it is there.

    For keys of all projects. One that was killed is listed until its lease is over, half a minute at most.
    """
    with connect() as client:
        found = list(client.workers.list())
    if json:
        print_json(found)
        return
    rows = [
        [
            worker.name.partition("/")[2],
            f"{worker.kind}s",
            worker.job or "idle",
            f"{worker.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}",
        ]
        for worker in found
    ]
    print_table(
        ["WORKER", "TAKES", "JOB", "SINCE (UTC)"], rows, empty="no worker is there: nothing takes scans or runs"
    )
