"""Git: what is fetched, and what is refused before git ever runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.core.errors import BrokenBundle, EmptySource, InvalidArgument, InvalidGitUrl, SourceUnreachable
from services.ingest.files import FoundFile, Skipped
from services.ingest.limits import Limits
from services.ingest.sources import git

LIMITS = Limits(max_seconds=30)


def run(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    run(folder, "init", "-q", "-b", "main")
    (folder / "app.py").write_text("one = 1\n")
    (folder / "lib").mkdir()
    (folder / "lib" / "tool.py").write_text("two = 2\n")
    (folder / "lib" / "run.sh").write_text("echo\n")
    (folder / "lib" / "run.sh").chmod(0o755)
    (folder / "link.py").symlink_to("/etc/passwd")
    run(folder, "add", ".")
    run(folder, "commit", "-q", "-m", "one")
    run(folder, "tag", "v1")
    (folder / "app.py").write_text("one = 11\n")
    run(folder, "commit", "-qam", "two")
    return folder


class _Backend(BaseHTTPRequestHandler):
    """git http-backend behind HTTP, as a company's git server would answer."""

    root: Path

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        environment = {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "PATH": "/usr/bin:/bin:/usr/local/bin",
        }
        answer = subprocess.run(["git", "http-backend"], env=environment, input=body, capture_output=True, check=True)
        head, _, content = answer.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200 OK").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = type("Handler", (_Backend,), {"root": tmp_path})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}/"
    http.shutdown()
    thread.join()
    http.server_close()


def contents(repository: git.Repository, subpath: str = "") -> dict[str, bytes]:
    return {f.path: f.data for f in git.read(repository, subpath, LIMITS) if isinstance(f, FoundFile)}


def test_fetches_over_http(repo: Path, server: str, tmp_path: Path) -> None:
    fetched = git.fetch(server + "repo/.git", "", tmp_path / "bare", LIMITS, [server])
    assert fetched.commit == run(repo, "rev-parse", "HEAD")
    assert contents(fetched)["app.py"] == b"one = 11\n"
    assert len(run(tmp_path / "bare", "rev-list", "--all").split()) == 1, "no history travels"
    assert not list((tmp_path / "bare").rglob("*.py")), "nothing is checked out"


def test_fetches_a_tag_and_a_subpath(repo: Path, server: str, tmp_path: Path) -> None:
    fetched = git.fetch(server + "repo/.git", "v1", tmp_path / "bare", LIMITS, [server])
    assert contents(fetched)["app.py"] == b"one = 1\n"
    assert contents(fetched, "lib") == {"tool.py": b"two = 2\n", "run.sh": b"echo\n"}


def test_keeps_the_executable_bit_and_leaves_out_symlinks(repo: Path, server: str, tmp_path: Path) -> None:
    entries = list(git.read(git.fetch(server + "repo/.git", "", tmp_path / "bare", LIMITS, [server]), "", LIMITS))
    modes = {entry.path: entry.mode for entry in entries if isinstance(entry, FoundFile)}
    assert modes == {"app.py": 0o644, "lib/tool.py": 0o644, "lib/run.sh": 0o755}
    assert [entry for entry in entries if isinstance(entry, Skipped)] == [Skipped("symlink")]


def test_unknown_ref_and_repository_say_why(repo: Path, server: str, tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match="nowhere"):
        git.fetch(server + "repo/.git", "nowhere", tmp_path / "a", LIMITS, [server])
    with pytest.raises(SourceUnreachable) as caught:
        git.fetch(server + "missing", "", tmp_path / "b", LIMITS, [server])
    assert caught.value.hint


def test_empty_repository(server: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", "init", "-q", "--bare")
    with pytest.raises(EmptySource):
        git.fetch(server + "empty", "", tmp_path / "bare", LIMITS, [server])


@pytest.mark.parametrize("ref", ["", "main", "v1"])
def test_reads_a_bundle(repo: Path, tmp_path: Path, ref: str) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "--all")
    taken = git.unbundle(tmp_path / "b", ref, tmp_path / "bare", LIMITS)
    assert taken.commit == run(repo, "rev-parse", f"{ref or 'HEAD'}^{{commit}}")
    assert set(contents(taken)) == {"app.py", "lib/tool.py", "lib/run.sh"}


def test_a_bundle_of_head_alone_is_enough(repo: Path, tmp_path: Path) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "HEAD")
    assert git.unbundle(tmp_path / "b", "", tmp_path / "bare", LIMITS).commit == run(repo, "rev-parse", "HEAD")


def test_broken_bundles(repo: Path, tmp_path: Path) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "--all")
    whole = (tmp_path / "b").read_bytes()
    for name, data in (("truncated", whole[:-40]), ("text", b"no bundle\n"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenBundle):
            git.unbundle(tmp_path / name, "", tmp_path / f"bare-{name}", LIMITS)
    with pytest.raises(BrokenBundle, match="nowhere"):
        git.unbundle(tmp_path / "b", "nowhere", tmp_path / "bare", LIMITS)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "-upload-pack=touch /tmp/x",
        "--upload-pack=x",
        "ext::sh -c touch% /tmp/x",
        "file:///etc",
        "/etc",
        "../x",
        "https://user:pw@host/x",
        "https://token@host/x",
        "ssh://-oProxyCommand=x/y",
        "http://host/x",
        "git://host/x",
        "https://host/x\nfoo",
        "https://host/ x",
        "host:path",
        "-o@host:x",
        "a@-host:x",
        "https://",
        "fd::17",
    ],
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(InvalidGitUrl) as caught:
        git.check_url(url)
    assert caught.value.field == "git.url"


@pytest.mark.parametrize(
    "url", ["https://host/x.git", "https://host:8443/x", "ssh://git@host/x", "ssh://git@host:22/x", "git@host:a/b.git"]
)
def test_accepted_urls(url: str) -> None:
    git.check_url(url)


@pytest.mark.parametrize("ref", ["-x", "--upload-pack=x", "a..b", "a b", "a@{1}", "a:b", "^a", "a.lock"])
def test_refused_refs(ref: str) -> None:
    with pytest.raises(InvalidArgument):
        git.check_ref(ref)


def test_hooks_and_configuration_of_a_repository_do_nothing(repo: Path, server: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hook = repo / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!{sys.executable}\nopen({str(trace)!r}, 'w')\n")
    hook.chmod(0o755)
    (repo / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = ../repo\n')
    run(repo, "add", ".gitmodules")
    run(repo, "commit", "-qm", "three")
    contents(git.fetch(server + "repo/.git", "", tmp_path / "bare", LIMITS, [server]))
    assert not trace.exists()
