"""A local git repository as a bundle: one file that an ingest service on another machine can take."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from services.core.errors import EmptySource, FailedPrecondition, InvalidArgument


def make_bundle(repository: Path, target: Path, *, ref: str = "") -> None:
    """Writes the history of HEAD, or of every branch and tag when a ref is asked for.

    Args:
        repository: a checkout, a folder inside one, or a bare repository.
        target: the bundle to write.
        ref: branch, tag or commit id that has to be in it; empty means HEAD.

    Raises:
        InvalidArgument: the folder is no git repository, or has no such ref.
        EmptySource: it has no commit.
        FailedPrecondition: git is missing or fails.
    """
    if _git(repository, "rev-parse", "--git-dir").returncode != 0:
        raise InvalidArgument(
            f"{repository} is not a git repository", field="git", hint="Give a checkout, a bare repository or a URL."
        )
    if _git(repository, "rev-parse", "--verify", "--quiet", "HEAD").returncode != 0:
        raise EmptySource(f"{repository} has no commit yet", field="git", hint="Commit something first.")
    if (
        ref
        and _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}").returncode != 0
    ):
        raise InvalidArgument(f"{repository} has no {ref!r}", field="ref", hint="See `git branch` and `git tag`.")
    made = _git(repository, "bundle", "create", "--quiet", str(target.absolute()), "--all" if ref else "HEAD")
    if made.returncode != 0:
        raise FailedPrecondition(f"git bundle failed: {made.stderr.strip()}", hint="Check it with `git fsck`.")


def has_changes(repository: Path) -> bool:
    """Whether tracked files differ from HEAD: such changes do not travel."""
    return bool(_git(repository, "status", "--porcelain", "--untracked-files=no").stdout.strip())


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Inside a git hook these variables name the hook's repository and would win over -C.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(repository), *arguments]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FailedPrecondition("git is not installed", hint="Install git, or upload an archive.") from error
