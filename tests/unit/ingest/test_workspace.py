"""The local disk: what is kept, for how long, and for whom."""

from __future__ import annotations

import os
import time
from pathlib import Path

from codegraft.ingest.v1.source_pb2 import GitSource, Source
from services.ingest.workspace import UPLOADS, Workspace


def source(name: str, url: str = "https://example.com/a", made: int = 1) -> Source:
    found = Source(name=f"projects/p/sources/{name}", git=GitSource(url=url))
    found.create_time.FromSeconds(made)
    return found


def give(workspace: Workspace, to: Source, size: int = 100) -> None:
    with workspace.folder() as folder:
        repository = folder / "repository"
        (repository / "objects" / "pack").mkdir(parents=True)
        (repository / "objects" / "pack" / "one.pack").write_bytes(bytes(size))
        workspace.give(to, repository)


def has(workspace: Workspace, of: Source, tmp_path: Path) -> bool:
    """Takes it, too."""
    return workspace.take(of, tmp_path / str(time.monotonic_ns()))


def test_a_repository_is_its_sources_alone(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "root", 1 << 20)
    mine = source("a")
    give(workspace, mine)
    others = source("b"), source("a", url="https://example.com/b"), source("a", made=2)
    assert not any(has(workspace, other, tmp_path) for other in others)
    assert has(workspace, mine, tmp_path)
    assert not has(workspace, mine, tmp_path), "one has it at a time"


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "root", 90_000)
    sources = [source(name) for name in "abc"]
    for age, one in enumerate(sources):
        give(workspace, one, size=20_000)
        newest = max((tmp_path / "root" / "repositories").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (time.time() - 100 * (3 - age),) * 2)
    small = Workspace(tmp_path / "root", 60_000)
    small.tidy(sources)
    assert [has(small, one, tmp_path) for one in sources] == [False, True, True]


def test_nothing_is_kept_when_told_so(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "root", 0)
    give(workspace, source("a"))
    assert not has(workspace, source("a"), tmp_path)


def test_what_dead_processes_left_goes_and_what_others_use_stays(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "root", 1 << 20)
    left = tmp_path / "root" / "fetch-dead"
    (left / "repository").mkdir(parents=True)
    broken, newer = tmp_path / "root" / UPLOADS / "p-0-old", tmp_path / "root" / UPLOADS / "p-0-new"
    for path in (broken, newer):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.utime(left, (time.time() - 2 * 86_400,) * 2)
    os.utime(newer, (time.time() - 6 * 86_400,) * 2)
    os.utime(broken, (time.time() - 8 * 86_400,) * 2)
    with workspace.folder() as busy:
        workspace.tidy([])
        assert busy.exists() and not left.exists() and newer.exists() and not broken.exists()
    assert not busy.exists()
