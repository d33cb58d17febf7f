"""Submodules, when they are asked for: each is a repository of its own that is fetched at the commit that is recorded.

A path in .gitmodules is only compared with the tree, and never used as a path: CVE-2025-48384 and its kind have nothing
to hold on to.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import InvalidGitUrl, LimitExceeded
from services.ingest.files import plain_path
from services.ingest.sources.git.fetch import Repository, fetch_objects
from services.ingest.sources.git.tree import entries
from services.ingest.sources.git.urls import check_url, relative
from services.ingest.sources.guard import Guard

MAX_SUBMODULES = 200
"""Submodules of one source, with theirs."""
MAX_DEPTH = 5
"""Submodules within submodules."""


@dataclass(frozen=True, slots=True)
class Submodule:
    """One submodule of a commit."""

    path: str
    url: str
    """Checked, and absolute."""
    commit: str


def find(repository: Repository, url: str, subpath: str, guard: Guard) -> tuple[list[Submodule], int]:
    """The submodules below a folder of a repository that came from the URL, and how many have no URL to be had from.

    Raises:
        InvalidGitUrl: one has a URL that is refused.
        LimitExceeded: there are too many.
    """
    links = {entry.path: entry.object_id for entry in entries(repository, subpath) if entry.is_submodule}
    if not links:
        return [], 0
    if len(links) > MAX_SUBMODULES:
        raise LimitExceeded(f"the repository has {len(links)} submodules", hint="Add those that matter as sources.")
    told_in = repository.git.run("rev-parse", "--verify", "--quiet", f"{repository.commit}:.gitmodules")
    object_id = told_in.output.decode().strip()
    if told_in.code:
        return [], len(links)
    if repository.git.run("cat-file", "-e", object_id).code:  # it is known, or outside the sub-folder
        fetch_objects(repository, [object_id])
    done = repository.git.run("config", "--blob", object_id, "--null", "--list")
    settings: dict[str, dict[str, str]] = {}
    for record in done.output.decode(errors="surrogateescape").split("\0") if not done.code else ():
        key, _, value = record.partition("\n")
        if key.startswith("submodule."):
            name, _, setting = key.removeprefix("submodule.").rpartition(".")
            settings.setdefault(name, {})[setting] = value
    found = []
    for told in settings.values():
        path = plain_path(told.get("path", ""), repository.git.meter.limits)
        if path is None or path not in links or "url" not in told:
            continue
        try:
            absolute = check_url(relative(told["url"], url), guard)
        except InvalidGitUrl as error:
            raise InvalidGitUrl(
                f"the submodule {path} cannot be fetched: {error.message}",
                field="git.submodules",
                hint="Add the source without submodules, or allow its URL.",
            ) from None
        found.append(Submodule(path, absolute, links[path]))
    return found, len(links) - len(found)
