"""``codegraft project``: the name spaces of everything else."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.connect import connect, id_of
from services.cli.output import Json, err, print_json, print_table

app = typer.Typer(help="Projects: name spaces of sources, datasets, runs and the serving choice.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="PROJECT", help="1 to 64 lower-case letters, digits and hyphens.")]


@app.command()
def create(
    project: Id,
    title: Annotated[str, typer.Option(help="Title for people.")] = "",
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to leave out, in .gitignore syntax.")] = None,
    json: Json = False,
) -> None:
    """Create a project."""
    with connect() as client:
        created = client.projects.create(project, title=title, exclude=exclude or ())
    if json:
        print_json(created)
    else:
        err.print(f"created {created.name}")


@app.command("list")
def list_(json: Json = False) -> None:
    """List the projects."""
    with connect() as client:
        projects = list(client.projects.list())
    if json:
        print_json(projects)
        return
    rows = [[id_of(p.name), p.title, p.create_time.ToDatetime().isoformat(" ", "minutes")] for p in projects]
    print_table(["PROJECT", "TITLE", "CREATED (UTC)"], rows, empty="no project yet: codegraft project create NAME")


@app.command()
def delete(
    project: Id,
    force: Annotated[bool, typer.Option("--force", help="Delete its sources and snapshots too.")] = False,
    json: Json = False,
) -> None:
    """Delete a project; one with sources only with --force."""
    with connect() as client:
        client.projects.delete(project, force=force)
    if json:
        print_json({"deleted": project})
    else:
        err.print(f"deleted {project}")
