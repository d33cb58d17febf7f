"""Names of models: what a client chooses from, and which project and version that is.

acme                    the project's serving policy (off, latest best, pinned, split) decides
acme@base               the base model
acme@r-0abc/120         that run's checkpoint at step 120
smollm2-135m            the base model by its own name
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from codegraft.inference.v1.completion_pb2 import AdapterChoice
from services.client import AsyncCodegraft
from services.core import names
from services.core.errors import InvalidArgument, InvalidName, ModelNotFound

BASE = "base"
_REMEMBERED = 60.0
"""Seconds for which the base model's name counts as known: it changes with a restart of inference only."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a request is for."""

    project: str
    """Its id."""
    adapter: AdapterChoice


def alias(project: str, version: str = "") -> str:
    """The model's name, of a project's name or id."""
    project = project.removeprefix("projects/")
    return f"{project}@{version}" if version else project


def checkpoint_alias(checkpoint: str) -> str:
    """The model's name of a checkpoint's."""
    ids = names.parse(names.CHECKPOINT, checkpoint)
    return alias(ids["project"], f"{ids['run']}/{ids['step']}")


class ModelNames:
    """Reads the names; asks the services for what they do not say."""

    def __init__(self, client: AsyncCodegraft) -> None:
        self._client = client
        self._base, self._asked = "", float("-inf")

    async def target(self, model: str, project: str) -> Target:
        """Whom a request is for.

        Args:
            model: as the client sent it; empty when it did not.
            project: the project that address or header name; empty when neither does.

        Raises:
            ModelNotFound: no model has such a name.
            InvalidArgument: the name is of another project, or it does not say which project and there are several.
        """
        named, at, version = model.partition("@")
        if model and not at and model == await self._base_model():
            named, at, version = "", "@", BASE
        if named and project and named != project:
            raise InvalidArgument(
                f"{model!r} is not a model of {project}",
                field="model",
                hint=f"Use {project}, {project}@base or {project}@RUN/STEP.",
            )
        found = named or project or await self._only_project()
        try:
            return Target(names.check_id(found, "project"), _choice(found, version) if at else AdapterChoice())
        except InvalidName:
            raise ModelNotFound(
                f"there is no model {model[:80]!r}", field="model", hint="GET /v1/models lists what there is."
            ) from None

    async def _base_model(self) -> str:
        if time.monotonic() - self._asked > _REMEMBERED:
            async for model in self._client.completions.models():
                self._base, self._asked = model.id, time.monotonic()
        return self._base

    async def _only_project(self) -> str:
        """The one project that the caller may use."""
        found: list[str] = []
        async for project in self._client.projects.list(page_size=2):
            found.append(project.name.removeprefix("projects/"))
            if len(found) > 1:
                break
        if len(found) != 1:
            raise InvalidArgument(
                "the request does not say which project it is for",
                field="model",
                hint="Name it as the model, in the X-Codegraft-Project header, or as /projects/PROJECT before the rest "
                "of the address.",
            )
        return found[0]


def _choice(project: str, version: str) -> AdapterChoice:
    if version == BASE:
        return AdapterChoice(base=True)
    run, _, step = version.partition("/")
    return AdapterChoice(checkpoint=names.build(names.CHECKPOINT, project=project, run=run, step=step))
