"""``codegraft completions``: the texts that a project wants kept of what editors were shown and took."""

from __future__ import annotations

from typing import Annotated

import typer

from codegraft.inference.v1.feedback_pb2 import FeedbackEvent, KeptCompletion
from services.cli.connect import Project, connect, id_of
from services.cli.output import Json, err, print_json, print_table
from services.core.places import first_line

app = typer.Typer(
    help="Texts of completions, kept for 30 days where `project set --keep-completions` says so.", no_args_is_help=True
)


@app.command("list")
def list_(project: Project, json: Json = False) -> None:
    """Show the texts that were kept, the oldest first; it takes an operator's key.

    With --json one object a line: the completion, when and by which version it was made (empty: the base model), what
    was shown, accepted and left after an edit, as far as editors sent it, and the last event.

    They are deleted when keeping is turned off, and with the project: to have them longer, write them down before.

    Example: codegraft completions list -p acme --json > completions.jsonl
    """
    rows: list[list[object]] = []
    with connect() as client:
        for kept in client.feedback.kept(project, page_size=1000):
            if json:
                print_json(_plain(kept))
                continue
            text = (kept.edited or kept.accepted or kept.shown).decode()
            time = kept.create_time.ToDatetime().isoformat(" ", "seconds")
            rows.append([time, kept.adapter_sha256[:12] or "base", _event(kept), len(text), first_line(text)])
    if not json:
        empty = "nothing is kept; an operator turns it on: codegraft project set PROJECT --keep-completions"
        print_table(["TIME (UTC)", "VERSION", "EVENT", "CHARS", "FIRST LINE"], rows, empty=empty)


@app.command()
def delete(
    project: Project,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete every text that was kept; counts stay, and so does the switch."""
    if not yes:
        typer.confirm(f"Delete all texts of completions of {project}?", abort=True, err=True)
    with connect() as client:
        deleted = client.feedback.delete_kept(project)
    if json:
        print_json({"deleted": deleted})
    else:
        err.print(f"deleted the texts of {deleted} completions")


def _plain(kept: KeptCompletion) -> dict[str, str]:
    return {
        "completion_id": id_of(kept.name),
        "time": kept.create_time.ToJsonString(),
        "adapter_sha256": kept.adapter_sha256,
        "shown": kept.shown.decode(),
        "accepted": kept.accepted.decode(),
        "edited": kept.edited.decode(),
        "event": _event(kept),
    }


def _event(kept: KeptCompletion) -> str:
    return FeedbackEvent.Name(kept.event).removeprefix("FEEDBACK_EVENT_")
