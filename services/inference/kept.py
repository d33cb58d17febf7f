"""The texts of completions that a project wants kept: what was shown, what was taken, what was left of it.

They come with feedback, from the editor that has them; nothing is remembered of a completion whose editor says nothing.
A bucket of their own holds them, which forgets them by itself and has room for so much, so that texts never crowd out
policies and counts.
"""

from __future__ import annotations

import contextlib
import math
from datetime import timedelta

from codegraft.inference.v1.feedback_pb2 import (
    FEEDBACK_EVENT_ACCEPTED,
    FEEDBACK_EVENT_EDITED,
    FeedbackEvent,
    KeptCompletion,
)
from services.core import log, names
from services.core.errors import Aborted, DeadlineExceeded, InvalidArgument, NotFound, ResourceExists, Unavailable
from services.core.state import Bounds, Table
from services.inference import completion_id
from services.inference.completion_id import CompletionId
from services.inference.policy import Projects

BUCKET = "completions"
BOUNDS = Bounds(timedelta(days=30), 1 << 30)
MOST_CHARACTERS = 20_000
"""Of one text."""
_log = log.get("inference.kept")


class Kept:
    """The texts of all projects, shared by all replicas."""

    def __init__(self, table: Table[KeptCompletion], projects: Projects) -> None:
        self._table, self._projects = table, projects

    async def keep(self, project: str, completion: CompletionId, event: FeedbackEvent, text: str) -> bool:
        """Keeps a text beside the others of its completion, where the project wants that; whether it is kept.

        False also when it cannot be stored or ingest does not say, which is only logged: an editor's feedback does not
        fail of it.
        """
        try:
            since = await self._projects.kept_since(project)
            if since is None or completion.time < _milliseconds(since) / 1000:
                return False
            await self._store(f"{project}/completions/{completion.text}", completion, event, text)
        except (Unavailable, DeadlineExceeded, Aborted, NotFound) as error:
            _log.warning("a completion's text was not kept", project=project, reason=error.reason)
            return False
        return True

    async def _store(self, name: str, completion: CompletionId, event: FeedbackEvent, text: str) -> None:
        def change(record: KeptCompletion) -> None:
            record.event = event
            setattr(record, _FIELDS.get(event, "shown"), text.encode())

        made = KeptCompletion(name=name, adapter_sha256=completion.adapter_sha256)
        made.create_time.FromMilliseconds(int(completion.time * 1000))
        change(made)
        try:
            await self._table.create(made)
        except ResourceExists:
            await self._table.mutate(name, change)

    async def page(self, project: str, page_size: int, page_token: str) -> tuple[list[KeptCompletion], str]:
        """One page of a project's texts, the oldest completions first, as ids begin with the time.

        Raises:
            InvalidPageSize, InvalidPageToken.
            Unavailable, DeadlineExceeded: ingest does not say since when they are the project's.
        """
        since = await self._projects.kept_since(project)
        first = math.inf if since is None else _milliseconds(since)
        return await self._table.page(
            f"{project}/completions",
            page_size,
            page_token,
            where=lambda record: record.create_time.ToMilliseconds() >= first,
        )

    async def delete(self, project: str) -> int:
        """Deletes all of a project's texts; returns of how many completions."""
        return await self._delete(project, math.inf)

    async def settle(self, project: str) -> int:
        """Deletes what the project does not want any more: all of it, or what was there before it last wanted any.

        Raises:
            Unavailable, DeadlineExceeded: ingest or the state store does not answer.
        """
        since = await self._projects.kept_since(project)
        return await self._delete(project, math.inf if since is None else _milliseconds(since))

    async def _delete(self, project: str, before: float) -> int:
        deleted = 0
        for name in await self._table.names(f"{project}/completions/"):
            if completion_id.made(name.rpartition("/")[2]) < before:
                with contextlib.suppress(NotFound):  # its time was over
                    await self._table.delete(name)
                    deleted += 1
        return deleted

    async def projects(self) -> set[str]:
        """Those of which texts are there."""
        return {names.project_of(name) for name in await self._table.names()}


def _milliseconds(seconds: float) -> int:
    """Ids tell whole ones."""
    return int(seconds * 1000)


_FIELDS = {FEEDBACK_EVENT_ACCEPTED: "accepted", FEEDBACK_EVENT_EDITED: "edited"}


def check(text: str) -> None:
    """Returns when a text may be sent.

    Raises:
        InvalidArgument: it is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidArgument(
            f"text has {len(text)} characters",
            field="text",
            hint=f"Send at most {MOST_CHARACTERS:,}, or none: counting does not need it.",
        )
