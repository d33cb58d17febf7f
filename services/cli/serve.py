"""``codegraft serve``: which adapter answers for a project."""

from __future__ import annotations

from typing import Annotated

import typer

from codegraft.inference.v1.serving_pb2 import Serving, ServingMode, ServingStatus
from services.cli.connect import Project, checkpoint_name, connect
from services.cli.output import Json, err, print_json
from services.client import Codegraft

app = typer.Typer(help="Serving: which adapter answers for a project.", no_args_is_help=True)


@app.command("set")
def set_(
    project: Project,
    policy: Annotated[str, typer.Argument(metavar="off|latest-best|RUN[/STEP]", help="The new policy.")],
    json: Json = False,
) -> None:
    """Choose: the base model, every new best adapter as it comes, or one checkpoint (of a run: its best one).

    Running completions finish on the version they began with.
    """
    with connect() as client:
        mode, checkpoint = resolve(client, project, policy)
        serving = client.serving.set(project, mode, checkpoint=checkpoint)
    if json:
        print_json(serving)
    else:
        _tell(serving, None)


def resolve(client: Codegraft, project: str, policy: str) -> tuple[ServingMode, str]:
    """The mode, and the full name of the checkpoint where one is pinned.

    Raises:
        InvalidName: the policy is none of the three forms.
        CheckpointNotFound: the run has no such checkpoint, or no best one yet.
    """
    if policy == "off":
        return ServingMode.SERVING_MODE_OFF, ""
    if policy == "latest-best":
        return ServingMode.SERVING_MODE_LATEST_BEST, ""
    return ServingMode.SERVING_MODE_PINNED, client.runs.checkpoint(checkpoint_name(project, policy)).name


@app.command()
def show(project: Project, json: Json = False) -> None:
    """Show the policy, what it has come to, and what a replica serves."""
    with connect() as client:
        answer = client.serving.get(project)
    if json:
        print_json(answer)
    else:
        _tell(answer.serving, answer.status)


def _tell(serving: Serving, status: ServingStatus | None) -> None:
    mode = ServingMode.Name(serving.mode).removeprefix("SERVING_MODE_").lower().replace("_", "-")
    err.print(f"policy   {mode}")
    loss = f", test loss {serving.wanted_test_loss:.4f}" if serving.HasField("wanted_test_loss") else ""
    err.print(f"wanted   {serving.wanted_checkpoint or 'the base model'}{loss}")
    if status is None:
        return
    err.print(
        f"active   {status.active_checkpoint or 'the base model'}{'' if status.converged else ' (not yet the wanted)'}"
    )
    if status.HasField("failure"):
        err.print(f"refused  {status.failure.message}")
    streams = sum(status.streams.values())
    err.print(f"replica  {status.replica}, {status.model}, {'ready' if status.ready else 'loading'}, {streams} streams")
