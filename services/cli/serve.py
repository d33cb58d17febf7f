"""``codegraft serve``: which adapter answers for a project."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated

import typer

from codegraft.inference.v1.serving_pb2 import Serving, ServingMode, ServingStatus, Split
from services.cli import lineage
from services.cli.connect import Project, checkpoint_name, connect, id_of
from services.cli.output import Json, err, print_json, print_table
from services.client import Codegraft
from services.core import names
from services.core.errors import FailedPrecondition, InvalidArgument

_MODES = {mode: name.removeprefix("SERVING_MODE_").lower().replace("_", "-") for name, mode in ServingMode.items()}
app = typer.Typer(help="Serving: which adapter answers for a project.", no_args_is_help=True)


@app.command("set")
def set_(
    project: Project,
    policy: Annotated[str, typer.Argument(metavar="off|latest-best|RUN[/STEP]", help="The new policy.")],
    split: Annotated[
        str, typer.Option(metavar="base|RUN[/STEP]", help="Another version, which answers a part of the requests.")
    ] = "",
    percent: Annotated[int, typer.Option(help="That part in percent, 1 to 99.")] = 0,
    json: Json = False,
) -> None:
    """Choose: the base model, every new best adapter as it comes, or one checkpoint (of a run: its best one).

    Running completions finish on the version they began with. With --split and --percent another version answers a part
    of the requests; an editor session stays on one side. A policy that is set without them ends a split.
    """
    if bool(split) != bool(percent):
        raise InvalidArgument(
            "a split needs a version and its part",
            field="--percent" if split else "--split",
            hint="Give both, as in --split RUN/STEP --percent 10.",
        )
    with connect() as client:
        mode, checkpoint = resolve(client, project, policy)
        other = resolve(client, project, "off" if split == "base" else split)[1] if split else ""
        second = Split(checkpoint=other, percent=percent) if split else None
        serving = client.serving.set(project, mode, checkpoint=checkpoint, split=second)
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
def approve(
    project: Project,
    checkpoint: Annotated[
        str, typer.Argument(metavar="[RUN/STEP]", help="The waiting checkpoint; left out: whichever waits.")
    ] = "",
    json: Json = False,
) -> None:
    """Let a new best adapter serve though its test loss is worse than the serving one's on the same test set.

    With latest-best such an adapter waits; `codegraft serve show` names it.
    """
    with connect() as client:
        waiting = checkpoint_name(project, checkpoint) if checkpoint else ""
        waiting = waiting or client.serving.get(project).serving.waiting_checkpoint
        if not waiting:
            raise FailedPrecondition("no checkpoint waits for approval", hint="See `codegraft serve show`.")
        serving = client.serving.approve(project, waiting)
    if json:
        print_json(serving)
    else:
        _tell(serving, None)


@app.command()
def show(project: Project, json: Json = False) -> None:
    """Show the policy, what it has come to, what it came to before, and what a replica serves."""
    with connect() as client:
        answer = client.serving.get(project)
    if json:
        print_json(answer)
    else:
        _tell(answer.serving, answer.status)


app.command()(lineage.lineage)


@app.command()
def adapters(json: Json = False) -> None:
    """List the adapters that a replica holds in memory; for keys of all projects.

    Checkpoints of several runs may have the same weights: these are held once, and a line for each name is shown.
    """
    with connect() as client:
        found = list(client.serving.adapters())
    if json:
        print_json(found)
        return
    rows: list[list[object]] = []
    for each in found:
        facts: list[object] = [each.lora_r, each.size, each.streams, ", ".join(map(id_of, each.projects)) or "-"]
        for name in each.checkpoints or [each.checkpoint]:
            ids = names.parse(names.CHECKPOINT, name)
            rows.append([ids["project"], f"{ids['run']}/{ids['step']}", each.sha256[:12], *facts])
            facts = [None] * 4
    columns = ["PROJECT", "RUN/STEP", "VERSION", "RANK", "BYTES", "STREAMS", "SERVES"]
    print_table(columns, rows, empty="no adapter: the base model answers")


@app.command()
def load(
    project: Project,
    checkpoint: Annotated[str, typer.Argument(metavar="RUN[/STEP]", help="Which one; of a run its best.")],
    json: Json = False,
) -> None:
    """Bring an adapter into a replica's memory without serving it, so that a later switch takes no time.

    It is verified first, and keeps its place until it is unloaded.
    """
    with connect() as client:
        name = client.runs.checkpoint(checkpoint_name(project, checkpoint)).name
        loaded = client.serving.load(name)
    if json:
        print_json(loaded)
    else:
        err.print(f"loaded {loaded.checkpoint}, version {loaded.sha256[:12]}, {loaded.size:,} bytes")


@app.command()
def unload(
    project: Project,
    checkpoint: Annotated[str, typer.Argument(metavar="RUN/STEP", help="As `codegraft serve adapters` lists it.")],
    json: Json = False,
) -> None:
    """Free the place of an adapter that no policy names, once its last stream has ended."""
    name = checkpoint_name(project, checkpoint)
    with connect() as client:
        client.serving.unload(name)
    if json:
        print_json({"unloaded": name})
    else:
        err.print(f"unloaded {name}")


def _tell(serving: Serving, status: ServingStatus | None) -> None:
    err.print(f"policy   {_MODES[serving.mode]}")
    loss = f", test loss {serving.wanted_test_loss:.4f}" if serving.HasField("wanted_test_loss") else ""
    err.print(f"wanted   {serving.wanted_checkpoint or 'the base model'}{loss}")
    if serving.previous_checkpoint:
        err.print(f"before   {serving.previous_checkpoint}")
    if serving.HasField("split"):
        err.print(f"split    {_split(serving.split)}")
    if serving.waiting_checkpoint:
        err.print(
            f"waiting  {serving.waiting_checkpoint}: test loss {serving.waiting_test_loss:.4f}, worse on the same test "
            "set; `codegraft serve approve` lets it serve"
        )
    if status is None:
        return
    for each in serving.history:
        when = each.time.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S")
        err.print(f"since    {when} {_MODES[each.mode]}: {each.checkpoint or 'the base model'}")
    split = f", {_split(status.active_split)}" if status.HasField("active_split") else ""
    behind = "" if status.converged else " (not yet the wanted)"
    err.print(f"active   {status.active_checkpoint or 'the base model'}{split}{behind}")
    if status.HasField("failure"):
        err.print(f"refused  {status.failure.message}")
    streams = sum(status.streams.values())
    err.print(f"replica  {status.replica}, {status.model}, {'ready' if status.ready else 'loading'}, {streams} streams")


def _split(split: Split) -> str:
    return f"{split.percent} % {split.checkpoint or 'the base model'}"
