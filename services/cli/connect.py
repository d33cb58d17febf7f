"""The client and the names that commands share: which services, which project, which resource."""

from __future__ import annotations

from typing import Annotated

import typer

from services.client import Codegraft
from services.core import names

Project = Annotated[
    str, typer.Option("--project", "-p", envvar="CODEGRAFT_PROJECT", help="Project to work in.", show_default=False)
]


def connect() -> Codegraft:
    """A client of the services that the environment names, else of the local stack.

    Raises:
        Unavailable: neither is there.
    """
    return Codegraft.local()


def full_name(pattern: str, value: str, project: str) -> str:
    """The resource's full name, of a full name or of an id within the project.

    Args:
        pattern: one of services.core.names, with ``{project}`` and one more id.

    Raises:
        InvalidName: it is neither.
    """
    if "/" in value:
        names.parse(pattern, value)
        return value
    kind = pattern.rpartition("{")[2].removesuffix("}")
    return names.build(pattern, project=project, **{kind: value})


def checkpoint_name(project: str, value: str) -> str:
    """A checkpoint's full name, of a full name, RUN/STEP, or RUN for the run's best one.

    Raises:
        InvalidName: it is none of these.
    """
    if value.startswith("projects/"):
        name = value if "/checkpoints/" in value else f"{value}/checkpoints/best"
    else:
        run, _, step = value.partition("/")
        name = f"{full_name(names.RUN, run, project)}/checkpoints/{step or 'best'}"
    names.parse(names.CHECKPOINT, name, field="checkpoint")
    return name


def id_of(name: str) -> str:
    """The last part of a resource name; empty for an empty one."""
    return name.rpartition("/")[2]
