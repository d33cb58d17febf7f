"""``codegraft acceptance``: how many suggestions editors took, per version that made them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from codegraft.inference.v1.feedback_pb2 import AdapterAcceptance
from services.cli.connect import Project, connect
from services.cli.output import Json, print_json, print_table


def acceptance(
    project: Project,
    days: Annotated[float, typer.Option(min=0.05, max=90, help="How far to look back.")] = 7,
    json: Json = False,
) -> None:
    """Show how many suggestions people took: per adapter, with the base model as the control.

    Editors tell what became of a suggestion with POST /v1/feedback at the gateway, or over gRPC; counts are all that is
    stored, unless the project keeps texts (`codegraft completions`). RATE is accepted of shown with its 95 % interval:
    where two intervals lie apart, one version is better. To give the base model its part of the requests:
    codegraft serve set latest-best --split base --percent 10.

    Example: codegraft acceptance -p acme --days 30
    """
    with connect() as client:
        answer = client.feedback.acceptance(project, timedelta(days=days))
    if json:
        print_json(answer)
        return
    print_table(
        ["VERSION", "SHOWN", "ACCEPTED", "REJECTED", "EDITED", "RATE", "95 %", "CHARS"],
        [
            [
                _version(entry),
                entry.shown,
                entry.accepted,
                entry.rejected,
                entry.edited,
                f"{entry.rate:.1%}",
                f"{entry.rate_low:.0%}-{entry.rate_high:.0%}",
                entry.accepted_characters,
            ]
            for entry in answer.adapters
        ],
        empty=f"no feedback on completions of the last {days:g} days",
    )


def _version(entry: AdapterAcceptance) -> str:
    if not entry.adapter_sha256:
        return "base"
    return entry.checkpoint.partition("/runs/")[2].replace("checkpoints/", "") or entry.adapter_sha256[:12]
