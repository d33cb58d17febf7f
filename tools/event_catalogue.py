"""What goes over the stream EVENTS: every type of event with its payload and its ids, and the table in docs/events.md.

Types, payloads and meanings come from the comments of protos/codegraft/event/v1. What only the code's flow tells (ids,
who follows) is in the tables below, which tests hold against the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.core import names
from tools import contract

PAGE = contract.ROOT / "docs" / "events.md"
BEGIN, END = "<!-- events: made by make docs -->", "<!-- end of events -->"
PACKAGE = "codegraft.event.v1"

ABOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "codegraft.ingest.project.changed.v1": (names.PROJECT, ("{subject}@{etag}", "{subject}@{etag}/deleted")),
    "codegraft.ingest.source.changed.v1": (names.SOURCE, ("{subject}@{etag}",)),
    "codegraft.ingest.snapshot.created.v1": (names.SNAPSHOT, ("{subject}",)),
    "codegraft.scanner.scan.changed.v1": (names.SCAN, ("{subject}@{epoch}-{state}",)),
    "codegraft.scanner.dataset.created.v1": (names.DATASET, (f"{{subject}}@{names.SCAN}",)),
    "codegraft.trainer.run.changed.v1": (names.RUN, ("{subject}@{epoch}-{state}",)),
    "codegraft.trainer.run.metric.v1": (names.RUN, ("{subject}/step-{step}", "{subject}/evaluation-{step}")),
    "codegraft.trainer.checkpoint.created.v1": (names.RUN, ("{subject}/checkpoint-{step}",)),
    "codegraft.trainer.checkpoint.best.v1": (names.RUN, ("{subject}/best-{step}",)),
    "codegraft.inference.serving.changed.v1": (names.SERVING, ("{subject}@{etag}",)),
    "codegraft.inference.adapter.swapped.v1": (names.SERVING, ("{random}",)),
    "codegraft.inference.adapter.waiting.v1": (names.SERVING, ("{subject}@{etag}/waiting",)),
    "codegraft.inference.adapter.rejected.v1": (names.SERVING, ("{random}",)),
}
"""By event type: what ``ce-subject`` names, and how ``ce-id`` is made."""

FOLLOWERS: dict[str, dict[str, str]] = {
    "codegraft.ingest.project.changed.v1": {
        "inference": "Every replica, from its start on. It deletes texts of completions that the project does not want"
        " kept any more. It also looks through all of them every so often: a lost event only delays.",
    },
    "codegraft.trainer.checkpoint.best.v1": {
        "inference": "Every replica, from its start on. It verifies and stages the checkpoint and lets it serve as the"
        " project's policy says. It also asks the trainer every so often: a lost event only delays.",
    },
}
"""Services that subscribe, with what they do. All other events are for others: dashboards, hooks of your own."""


@dataclass(frozen=True, slots=True)
class Event:
    """One type of event."""

    type: str
    message: str
    """Full name of the payload."""
    meaning: str
    subject: str
    """Form of ``ce-subject``."""
    ids: tuple[str, ...]

    @property
    def publisher(self) -> str:
        """The service that publishes it."""
        return self.type.split(".")[1]

    @property
    def short(self) -> str:
        """Name of the message."""
        return self.message.rpartition(".")[2]

    @property
    def subject_pattern(self) -> str:
        """Regular expression of ``ce-subject``."""
        return f"^{_pattern(self.subject, '')}$"

    @property
    def id_pattern(self) -> str:
        """Regular expression of ``ce-id``."""
        return "^(" + "|".join(_pattern(one, self.subject) for one in self.ids) + ")$"


def catalogue() -> list[Event]:
    """Every event, in the order of its proto file.

    Raises:
        SystemExit: the comments and the table above do not name the same events.
    """
    found = []
    for message in contract.packages()[PACKAGE].messages:
        told = re.match(r"(codegraft(?:\.[a-z]+){3}\.v1): (.+)", message.comment, re.DOTALL)
        if told and told[1] in ABOUT:
            subject, ids = ABOUT[told[1]]
            found.append(Event(told[1], message.name, _sentence(told[2]), subject, ids))
        elif told:
            raise SystemExit(f"{told[1]} of {message.name} is missing in {__name__}.ABOUT")
    if lost := ABOUT.keys() - {event.type for event in found}:
        raise SystemExit(f"no message of {PACKAGE} has a comment that begins with {sorted(lost)[0]}:")
    return found


def table() -> str:
    """The events for docs/events.md."""
    rows = [
        f"| `{event.type}` | {event.meaning} | [{event.short}](api/event.md#{event.short.lower()}) "
        f"| {', '.join(FOLLOWERS.get(event.type, {})) or 'nobody'} | {' or '.join(f'`{one}`' for one in event.ids)} |"
        for event in catalogue()
    ]
    return "\n".join(["| type and subject | when | payload | followed by | id |", "|---|---|---|---|---|", *rows])


def page() -> str:
    """docs/events.md with its table as it must be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def _sentence(text: str) -> str:
    joined = " ".join(text.split())
    return joined[0].upper() + joined[1:]


def _pattern(template: str, subject: str) -> str:
    """Regular expression of a template; ``subject`` is the template that {subject} stands for."""
    parts = re.split(r"(\{\w+\})", template)
    known = {"{subject}": _pattern(subject, "") if subject else "", "{random}": "[0-9a-f]{32}"}
    return "".join(known.get(part, "[a-z0-9-]+") if part.startswith("{") else re.escape(part) for part in parts)
