"""A local repository becomes one file that git itself accepts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from services.cli.bundle import has_changes, make_bundle
from services.core.errors import EmptySource, FailedPrecondition, InvalidArgument


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "a.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def heads(bundle: Path) -> set[str]:
    listed = subprocess.run(["git", "bundle", "list-heads", str(bundle)], check=True, capture_output=True, text=True)
    return {line.split()[1] for line in listed.stdout.splitlines()}


def test_the_bundle_can_be_cloned(repository: Path, tmp_path: Path) -> None:
    make_bundle(repository, tmp_path / "x.bundle")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(tmp_path / "x.bundle"), str(clone)], check=True)
    assert (clone / "a.py").read_text() == "a = 1\n"
    assert git(clone, "rev-parse", "HEAD") == git(repository, "rev-parse", "HEAD")
    assert heads(tmp_path / "x.bundle") == {"HEAD"}


def test_a_folder_inside_and_a_hook_s_environment_do_not_mislead(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "sub").mkdir()
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    make_bundle(repository / "sub", tmp_path / "x.bundle")
    assert heads(tmp_path / "x.bundle") == {"HEAD"}


def test_a_ref_brings_every_branch(repository: Path, tmp_path: Path) -> None:
    git(repository, "branch", "other")
    make_bundle(repository, tmp_path / "x.bundle", ref="other")
    assert {"HEAD", "refs/heads/main", "refs/heads/other"} <= heads(tmp_path / "x.bundle")


@pytest.mark.parametrize("ref", ["missing", "--output=x"])
def test_an_unknown_ref_is_named(repository: Path, tmp_path: Path, ref: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make_bundle(repository, tmp_path / "x.bundle", ref=ref)
    assert caught.value.field == "ref"


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not a git repository"):
        make_bundle(tmp_path, tmp_path / "x.bundle")


def test_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    with pytest.raises(EmptySource, match="no commit"):
        make_bundle(tmp_path, tmp_path / "x.bundle")


def test_no_git(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="not installed"):
        make_bundle(repository, tmp_path / "x.bundle")


def test_changes_that_stay_at_home_are_seen(repository: Path) -> None:
    assert not has_changes(repository)
    (repository / "untracked.py").write_text("")
    assert not has_changes(repository)
    (repository / "a.py").write_text("a = 2\n")
    assert has_changes(repository)
