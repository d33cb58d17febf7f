"""The texts of completions that a project wants kept: what was shown, what was taken, what was left of it.

They come with feedback, from the editor that has them; nothing is remembered of a completion whose editor says nothing.
A bucket of their own holds them, which forgets them by itself and has room for so much, so that texts never crowd out
policies and counts.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta

from codegraft.inference.v1.feedback_pb2 import (
    FEEDBACK_EVENT_ACCEPTED,
    FEEDBACK_EVENT_EDITED,
    FeedbackEvent,
    KeptCompletion,
)
from services.core import log
from services.core.errors import Aborted, InvalidArgument, NotFound, ResourceExists, StateUnavailable
from services.core.state import Bounds, Table
from services.inference.completion_id import CompletionId

BUCKET = "completions"
BOUNDS = Bounds(timedelta(days=30), 1 << 30)
MOST_CHARACTERS = 20_000
"""Of one text."""
_log = log.get("inference.kept")


class Kept:
    """The texts of all projects, shared by all replicas."""

    def __init__(self, table: Table[KeptCompletion]) -> None:
        self._table = table

    async def keep(self, project: str, completion: CompletionId, event: FeedbackEvent, text: str) -> bool:
        """Keeps a text beside the others of its completion; False when it cannot be stored, which is only logged:
        an editor's feedback does not fail of it."""
        name = f"{project}/completions/{completion.text}"

        def change(record: KeptCompletion) -> None:
            record.event = event
            setattr(record, _FIELDS.get(event, "shown"), text.encode())

        made = KeptCompletion(name=name, adapter_sha256=completion.adapter_sha256)
        made.create_time.FromMilliseconds(int(completion.time * 1000))
        change(made)
        try:
            try:
                await self._table.create(made)
            except ResourceExists:
                await self._table.mutate(name, change)
        except (StateUnavailable, Aborted, NotFound) as error:
            _log.warning("a completion's text was not kept", project=project, reason=error.reason)
            return False
        return True

    async def page(
        self, project: str, since: float, page_size: int, page_token: str
    ) -> tuple[list[KeptCompletion], str]:
        """One page of a project's texts, the oldest completions first, as ids begin with the time.

        Args:
            since: seconds since 1970; older completions are left out.

        Raises:
            InvalidPageSize, InvalidPageToken.
        """
        first = round(since * 1000)  # ids tell milliseconds
        return await self._table.page(
            f"{project}/completions",
            page_size,
            page_token,
            where=lambda record: record.create_time.ToMilliseconds() >= first,
        )

    async def delete(self, project: str) -> int:
        """Deletes all of a project's texts; returns of how many completions."""
        deleted = 0
        for record in await self._table.all(f"{project}/completions/"):
            with contextlib.suppress(NotFound):  # its time was over
                await self._table.delete(record.name)
                deleted += 1
        return deleted


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
