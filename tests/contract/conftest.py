"""Real git and ssh servers for the contract tests of ingest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import git_http, ssh
from tests.servers.git_http import GitServer
from tests.servers.ssh import SshServer


@pytest.fixture
def git_server(tmp_path: Path) -> Iterator[GitServer]:
    """Serves the repositories below tmp_path / "git" over HTTP."""
    with git_http.serving(tmp_path / "git") as running:
        yield running


@pytest.fixture
def allowed(git_server: GitServer) -> dict[str, object]:
    """Settings with which ingest may fetch from it."""
    return {"ingest_allowed_urls": (git_server.url,)}


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SshServer]:
    with ssh.serving(tmp_path / "sshd") as running:
        yield running
