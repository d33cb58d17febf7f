"""Git: what is fetched, and what is refused before git ever runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import BrokenBundle, EmptySource, InvalidArgument, InvalidGitUrl, SourceUnreachable
from services.ingest.files import FoundFile, SameFile, Skipped
from services.ingest.limits import Limits, Meter
from services.ingest.sources import git
from services.ingest.sources.git.process import Done, Git
from services.ingest.sources.guard import Guard
from tests.repositories import run
from tests.servers import git_http
from tests.servers.git_http import GitServer

LIMITS = Limits(max_seconds=30)


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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    with git_http.serving(tmp_path) as running:
        yield running


@contextmanager
def fetched(
    url: str, tmp_path: Path, ref: str = "", *, guard: Guard | None = None, name: str = "bare", **options: Any
) -> Iterator[git.Repository]:
    guard = guard or Guard(urls=["http://127.0.0.1"], networks=["127.0.0.0/8"])
    guard = Guard(urls=[*guard.urls, url], networks=guard.networks)
    meter = options.pop("meter", None) or Meter(LIMITS)
    secret, contents = options.pop("secret", None), options.pop("contents", True)
    location = git.check_url(url, guard)
    with git.reach(location, secret, guard, tmp_path / name, tmp_path / f"{name}-private", meter, **options) as remote:
        yield git.fetch(remote, ref, contents=contents)


def contents(repository: git.Repository, subpath: str = "") -> dict[str, bytes]:
    return {f.path: f.data for f in git.read(repository, subpath) if isinstance(f, FoundFile)}


def test_fetches_over_http(repo: Path, server: GitServer, tmp_path: Path) -> None:
    with fetched(server.url + "repo/.git", tmp_path) as repository:
        assert repository.commit == run(repo, "rev-parse", "HEAD")
        assert contents(repository)["app.py"] == b"one = 11\n"
    assert len(run(tmp_path / "bare", "rev-list", "--all").split()) == 1, "no history travels"
    assert not list((tmp_path / "bare").rglob("*.py")), "nothing is checked out"


def test_fetches_a_tag_and_a_subpath(repo: Path, server: GitServer, tmp_path: Path) -> None:
    with fetched(server.url + "repo/.git", tmp_path, "v1") as repository:
        assert contents(repository)["app.py"] == b"one = 1\n"
        assert contents(repository, "lib") == {"tool.py": b"two = 2\n", "run.sh": b"echo\n"}


def test_fetches_a_commit_by_its_id(repo: Path, server: GitServer, tmp_path: Path) -> None:
    first = run(repo, "rev-parse", "HEAD~1")
    with fetched(server.url + "repo/.git", tmp_path, first) as repository:
        assert (repository.commit, contents(repository)["app.py"]) == (first, b"one = 1\n")


def test_only_what_is_not_known_travels(repo: Path, server: GitServer, tmp_path: Path) -> None:
    (repo / "big.py").write_text("".join(f"x{number} = {number * 7919}\n" for number in range(50_000)))
    run(repo, "add", ".")
    run(repo, "commit", "-qm", "three")
    big = run(repo, "rev-parse", "HEAD:big.py")
    known = {big, run(repo, "rev-parse", "HEAD:app.py")}
    with fetched(server.url + "repo/.git", tmp_path, contents=False) as repository:
        entries = list(git.read(repository, known=known))
        found = {entry.path for entry in entries if isinstance(entry, FoundFile)}
        same = {entry.path for entry in entries if isinstance(entry, SameFile)}
        assert (found, same) == ({"lib/tool.py", "lib/run.sh"}, {"app.py", "big.py"})
        assert repository.git.run("cat-file", "-e", big).code != 0, "the large file did not travel"


def test_large_files_do_not_travel(repo: Path, server: GitServer, tmp_path: Path) -> None:
    (repo / "empty.py").touch()
    (repo / "big.py").write_text("# " + "x" * 5000)
    run(repo, "add", ".")
    run(repo, "commit", "-qm", "three")
    meter = Meter(Limits(max_file_bytes=4000))
    with fetched(server.url + "repo/.git", tmp_path, meter=meter) as repository:
        entries = list(git.read(repository))
        assert Skipped("oversize") in entries
        assert {e.path for e in entries if isinstance(e, FoundFile)} >= {"app.py", "empty.py"}
        assert repository.git.run("cat-file", "-e", run(repo, "rev-parse", "HEAD:big.py")).code != 0


def test_a_ref_that_moved_is_noticed(repo: Path, server: GitServer, tmp_path: Path) -> None:
    url, guard = server.url + "repo/.git", Guard(urls=[server.url])
    run(repo, "tag", "-a", "-m", "annotated", "v2")
    run(repo, "branch", "deep/main", "HEAD~1")
    head, first = run(repo, "rev-parse", "HEAD"), run(repo, "rev-parse", "HEAD~1")
    with git.reach(url, None, guard, tmp_path / "bare", tmp_path / "private", Meter(LIMITS)) as remote:
        for ref, commit in (("", head), ("main", head), ("v1", first), ("v2", head), ("refs/heads/main", head)):
            assert not git.moved(remote, ref, commit), ref
        assert not git.moved(remote, first, first)
        for ref, commit in (("", first), ("main", first), ("v1", head), ("gone", head)):
            assert git.moved(remote, ref, commit), ref


def test_keeps_the_executable_bit_and_leaves_out_symlinks(repo: Path, server: GitServer, tmp_path: Path) -> None:
    with fetched(server.url + "repo/.git", tmp_path) as repository:
        entries = list(git.read(repository))
    modes = {entry.path: entry.mode for entry in entries if isinstance(entry, FoundFile)}
    assert modes == {"app.py": 0o644, "lib/tool.py": 0o644, "lib/run.sh": 0o755}
    assert [entry for entry in entries if isinstance(entry, Skipped)] == [Skipped("symlink")]


def test_unknown_ref_and_repository_say_why(repo: Path, server: GitServer, tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match="nowhere"), fetched(server.url + "repo/.git", tmp_path, "nowhere"):
        pass
    with pytest.raises(SourceUnreachable) as caught, fetched(server.url + "missing", tmp_path, name="b"):
        pass
    assert caught.value.hint


TOTAL = "remote: Total 4 (delta 0), reused 0 (delta 0), pack-reused 0        "
PROGRESS = f"""remote: Enumerating objects: 4, done.        
remote: Counting objects:  50% (2/4)        \rremote: Counting objects: 100% (4/4), done.        
{TOTAL}
Receiving objects:  25% (1/4)\rReceiving objects:  50% (2/4), 12.00 MiB | 3.00 MiB/s\r"""
WRONG = "error: object c3c8ff: gitmodulesUrl: disallowed submodule url: -oProxyCommand=x"
FATAL = "fatal: fsck error in packed object"
LAST = "fatal: fetch-pack: invalid index-pack output"


@pytest.mark.parametrize(
    "said",
    [
        f"{PROGRESS}{WRONG}\n{FATAL}\n{LAST}\n",
        f"{PROGRESS}{WRONG}\n{TOTAL}\n{FATAL}\n{LAST}\n",
        f"{PROGRESS}{WRONG}\n{FATAL}\n{TOTAL}\n{LAST}\n",
        f"{PROGRESS}{WRONG}\n{FATAL}{TOTAL}\n\n{LAST}\n",
        f"{PROGRESS}{WRONG}\n{FATAL}\n{LAST}\n{TOTAL}\n",
    ],
)
def test_what_is_wrong_is_not_hidden_by_how_far_it_was(said: str) -> None:
    """The remote's progress comes through a process of its own, so between any two lines of git's."""
    assert Done(128, b"", said).complaint == f"{WRONG} {FATAL} {LAST}"


def test_what_the_remote_says_is_told() -> None:
    for words in ("Repository not found.", "Total 5 GB are more than your quota", "Other objects: none"):
        done = Done(128, b"", f"{PROGRESS}remote: {words}\nfatal: repository 'https://h/x/' not found\n")
        assert done.complaint == f"remote: {words} fatal: repository 'https://h/x/' not found"
    assert Done(128, b"", PROGRESS).complaint == "git ended with 128"


def test_what_is_wrong_is_told_after_a_long_progress(repo: Path, tmp_path: Path) -> None:
    bare = Git(repo / ".git", Meter(LIMITS))
    progress = "yes 'Receiving objects:  50% (2/4), 12.00 MiB | 3.00 MiB/s' | head -2000"
    run(repo, "config", "alias.long", f"!{{ {progress}; echo 'fatal: the end'; }} >&2; exit 3")
    done = bare.run("long")
    assert (done.code, done.complaint) == (3, "fatal: the end")


def test_empty_repository(server: GitServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", "init", "-q", "--bare")
    with pytest.raises(EmptySource), fetched(server.url + "empty", tmp_path):
        pass


@pytest.mark.parametrize("ref", ["", "main", "v1"])
def test_reads_a_bundle(repo: Path, tmp_path: Path, ref: str) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "--all")
    taken = git.unbundle(tmp_path / "b", ref, tmp_path / "bare", Meter(LIMITS))
    assert taken.commit == run(repo, "rev-parse", f"{ref or 'HEAD'}^{{commit}}")
    assert set(contents(taken)) == {"app.py", "lib/tool.py", "lib/run.sh"}


def test_a_bundle_of_head_alone_is_enough(repo: Path, tmp_path: Path) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "HEAD")
    assert git.unbundle(tmp_path / "b", "", tmp_path / "bare", Meter(LIMITS)).commit == run(repo, "rev-parse", "HEAD")


def test_broken_bundles(repo: Path, tmp_path: Path) -> None:
    run(repo, "bundle", "create", "-q", str(tmp_path / "b"), "--all")
    whole = (tmp_path / "b").read_bytes()
    for name, data in (("truncated", whole[:-40]), ("text", b"no bundle\n"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenBundle):
            git.unbundle(tmp_path / name, "", tmp_path / f"bare-{name}", Meter(LIMITS))
    with pytest.raises(BrokenBundle, match="nowhere"):
        git.unbundle(tmp_path / "b", "nowhere", tmp_path / "bare", Meter(LIMITS))


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
        git.check_url(url, Guard())
    assert caught.value.field == "git.url"


@pytest.mark.parametrize(
    "url", ["https://host/x.git", "https://host:8443/x", "ssh://git@host/x", "ssh://git@host:22/x", "git@host:a/b.git"]
)
def test_accepted_urls(url: str) -> None:
    assert git.check_url(url, Guard()).startswith(("https://", "ssh://"))


@pytest.mark.parametrize("ref", ["-x", "--upload-pack=x", "a..b", "a b", "a@{1}", "a:b", "^a", "a.lock"])
def test_refused_refs(ref: str) -> None:
    with pytest.raises(InvalidArgument):
        git.check_ref(ref)


def test_hooks_and_configuration_of_a_repository_do_nothing(repo: Path, server: GitServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("post-checkout", "reference-transaction", "post-merge", "pre-auto-gc"):
        hook = repo / ".git" / "hooks" / name
        hook.write_text(f"#!{sys.executable}\nopen({str(trace)!r}, 'w')\n")
        hook.chmod(0o755)
    (repo / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = ../repo\n')
    (repo / ".gitattributes").write_text("*.py filter=evil diff=evil\n")
    run(repo, "add", ".")
    run(repo, "commit", "-qm", "three")
    trace.unlink(missing_ok=True)
    with fetched(server.url + "repo/.git", tmp_path) as repository:
        contents(repository)
    assert not trace.exists()
