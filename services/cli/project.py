"""``codegraft project``: the name spaces of everything else."""

from __future__ import annotations

from typing import Annotated

import typer

from codegraft.ingest.v1.project_pb2 import Project
from services.cli.connect import connect, id_of
from services.cli.output import Json, err, out, print_json, print_table
from services.client import Codegraft
from services.core.errors import CodegraftError

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
def show(project: Id, json: Json = False) -> None:
    """Show a project: its title, masks, what scans leave out, and what it has stored."""
    with connect() as client:
        found = client.projects.get(project)
        if not json:
            _tell(found)
            _tell_storage(client, found.name)
    if json:
        print_json(found)


@app.command("set")
def set_(
    project: Id,
    title: Annotated[str | None, typer.Option(help="Title for people.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to leave out, in .gitignore syntax.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Mask of files to use; '' for every file.")] = None,
    language_off: Annotated[list[str] | None, typer.Option(help="Language that scans leave out; '' for none.")] = None,
    exclude_license: Annotated[
        list[str] | None, typer.Option(help="Licence that scans leave out, by SPDX id; * for anything; '' for none.")
    ] = None,
    keep_completions: Annotated[
        bool | None,
        typer.Option(
            "--keep-completions/--no-keep-completions",
            help="Keep texts of completions that editors send with feedback, for 30 days; off deletes all (operators).",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Change what is given and leave the rest; a list is replaced as a whole. The next snapshot has it.

    Texts of completions are kept only where --keep-completions was set: what editors send as shown, taken or edited.
    `codegraft completions` reads and deletes them; --no-keep-completions and the project's end delete them, too.

    Example: codegraft project set acme --language-off SQL --language-off HTML --exclude-license 'GPL-*'
    """
    with connect() as client:
        found = client.projects.get(project)
        if title is not None:
            found.title = title
        for field, given in (
            (found.exclude, exclude),
            (found.include, include),
            (found.languages_off, language_off),
            (found.exclude_licenses, exclude_license),
        ):
            if given is not None:
                field[:] = [value for value in given if value]
        if keep_completions is not None:
            found.keep_completions = keep_completions
        found = client.projects.update(found)
    if json:
        print_json(found)
    else:
        _tell(found)


def _tell(project: Project) -> None:
    out.print(f"{project.name}  {project.title}".rstrip())
    for name, values in (
        ("exclude", project.exclude),
        ("include", project.include),
        ("languages off", project.languages_off),
        ("licences off", project.exclude_licenses),
    ):
        if values:
            out.print(f"  {name + ':':15}{', '.join(values)}")
    if project.keep_completions:
        out.print("  texts of completions are kept: codegraft completions list")


def _tell_storage(client: Codegraft, project: str) -> None:
    """What it has stored, of its limit, and what for."""
    try:
        stored, limits = client.quotas.stored(project), client.quotas.get(project).effective
    except CodegraftError as error:
        err.print(f"what it has stored is not known: {error.message}")
        return
    of = f" of {limits.storage_bytes:,}" if limits.HasField("storage_bytes") else ""
    kinds = [f"{kind.name.replace('_', ' ')} {size:,}" for kind, size in stored.ListFields()]
    total = sum(size for _, size in stored.ListFields())
    out.print(f"  {'bytes stored:':15}{total:,}{of}" + (f" ({', '.join(kinds)})" if kinds else ""))


@app.command()
def delete(
    project: Id,
    force: Annotated[bool, typer.Option("--force", help="Delete its sources and snapshots too.")] = False,
    json: Json = False,
) -> None:
    """Delete a project with its datasets, runs and adapters; one with sources only with --force.

    Jobs that run are cancelled, completions of the project end with PROJECT_NOT_FOUND. It cannot be undone; the bytes
    go with the next codegraft snapshot gc. Its quota goes; keys of it alone are revoked, yours too, and keys of several
    projects lose it.
    """
    with connect() as client:
        client.projects.delete(project, force=force)
    if json:
        print_json({"deleted": project})
    else:
        err.print(f"deleted {project}")
