"""What the copies of records in the object store bring back: projects, sources, serving policies.

Services write them, see services/core/state/mirror.py. Plain functions: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from codegraft.inference.v1.serving_pb2 import SERVING_MODE_LATEST_BEST, Serving
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import SOURCE_STATE_PENDING, Source
from services.cli.control.documents import parsed
from services.core import names
from services.core.state.mirror import prefix

_OF_VERSION = {
    "wanted": ("checkpoint", "sha256", "test_loss", "test_set"),
    "waiting": ("checkpoint", "sha256", "test_loss"),
}
"""What a policy says of a version, by what the version is to it."""
M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Copies:
    """The records that were copied, each list by name."""

    projects: list[Project] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    """Projects that were deleted; what is left of them must not bring them back."""
    sources: list[Source] = field(default_factory=list)
    """To be fetched anew."""
    policies: list[Serving] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Keys of damaged copies."""


def read(found: Iterable[tuple[str, bytes]]) -> Copies:
    """The copies among objects, each with its key."""
    made = Copies()
    for key, text in sorted(found):
        if (project := _parsed("ingest", Project, names.PROJECT, key, text, made)) is not None:
            if project.name:
                made.projects.append(project)
            else:
                made.deleted.add(_name("ingest", Project, key))
        elif (source := _parsed("ingest", Source, names.SOURCE, key, text, made)) is not None:
            # The store has its files as of the last fetch; whether there are newer ones, the next fetch finds out.
            source.state, source.generation = SOURCE_STATE_PENDING, 1
            made.sources.append(source)
        elif (serving := _parsed("inference", Serving, names.SERVING, key, text, made)) is not None:
            made.policies.append(serving)
    made.sources = [one for one in made.sources if names.project_of(one.name) not in made.deleted]
    made.policies = [one for one in made.policies if names.project_of(one.name) not in made.deleted]
    return made


def upload_of(source: Source) -> str:
    """The upload that a source is made of; empty when it comes from elsewhere."""
    return source.bundle.upload or source.archive.upload or source.file.upload


def fitting(policy: Serving, checkpoints: Collection[str]) -> list[str]:
    """Lets a policy that follows the best forget versions that are not there any more, so that it finds the best anew.

    Returns:
        What a person has chosen in it and is not there; the policy names it still, and a person has to decide.
    """
    if policy.mode == SERVING_MODE_LATEST_BEST:
        for kind, words in _OF_VERSION.items():
            if getattr(policy, f"{kind}_checkpoint") not in checkpoints:
                for word in words:
                    policy.ClearField(cast(Any, f"{kind}_{word}"))
    if policy.previous_checkpoint not in checkpoints:
        policy.previous_checkpoint = ""
    return sorted({policy.pinned_checkpoint, policy.split.checkpoint} - {"", *checkpoints})


def _parsed(bucket: str, message_type: type[M], pattern: str, key: str, text: bytes, made: Copies) -> M | None:
    """The copy of a record of that type; None when the key is of no such, or it is damaged, which is noted."""
    name = _name(bucket, message_type, key)
    return parsed(text, message_type, name, pattern, place=key, unreadable=made.unreadable)


def _name(bucket: str, message_type: type[Message], key: str) -> str:
    """Name of the record of which the key is the copy; empty when it is of another type."""
    before = prefix(bucket, message_type)
    return key.removeprefix(before).removesuffix(".json") if key.startswith(before) else ""
