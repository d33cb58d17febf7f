"""Hostile repositories, submodules and addresses, against a real git git_server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from codegraft.ingest.v1 import source_pb2
from services.core import errors
from tests.repositories import repository, run
from tests.servers import git_http
from tests.servers.git_http import GitServer
from tests.servers.ingest import PROJECT, world


async def test_submodules_come_only_when_asked(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    root = tmp_path / "git"
    inner = repository(root / "inner", {"i.py": "i = 1\n"})
    library = repository(root / "library", {"l.py": "l = 1\n"})
    run(library, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "deep")
    app = repository(root / "app", {"a.py": "a = 1\n", "model.bin": "version https://git-lfs.github.com/spec/v1\n"})
    run(app, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "vendor/library")
    for repo, name, relative in ((library, "deep", "../../inner/.git"), (app, "vendor/library", "../../library/.git")):
        run(repo, "config", "-f", ".gitmodules", f"submodule.{name}.url", relative)
        run(repo, "add", ".")
        run(repo, "commit", "-qm", "submodule")
    run(app / "vendor/library", "pull", "-q", str(library), "main")
    run(app, "add", ".")
    run(app, "commit", "-qm", "newer")
    async with world(tmp_path, **allowed) as w:
        without = await w.add(git_server.url + "app/.git")
        assert dict(without.skipped) == {"submodule": 1, "lfs-pointer": 1}
        assert await w.paths() == [".gitmodules", "a.py"]
        await w.client.sources.remove(without.name)
        with_them = await w.add(git_server.url + "app/.git", submodules=True)
        assert dict(with_them.skipped) == {"lfs-pointer": 1}
        assert await w.paths() == [
            ".gitmodules", "a.py", "vendor/library/.gitmodules", "vendor/library/deep/i.py", "vendor/library/l.py"
        ]  # fmt: skip
        await w.client.sources.remove(with_them.name)
        below = await w.add(git_server.url + "app/.git", submodules=True, subpath="vendor")
        assert await w.paths() == ["library/.gitmodules", "library/deep/i.py", "library/l.py"], below


@pytest.mark.parametrize(
    "url", ["file:///etc", "ext::sh -c touch% x", "http://127.0.0.1:1/x", "-oProxyCommand=x", "https://user:pw@host/x"]
)
async def test_a_submodule_with_a_forbidden_url_fails_the_fetch(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], url: str
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    head = run(app, "rev-parse", "HEAD")
    (app / ".gitmodules").write_text(f'[submodule "x"]\n\tpath = x\n\turl = {url}\n')
    run(app, "add", ".gitmodules")
    run(app, "update-index", "--add", "--cacheinfo", f"160000,{head},x")
    run(app, "commit", "-qm", "evil")
    async with world(tmp_path, **allowed) as w:
        # git's own check refuses some of these as they come in.
        with pytest.raises((errors.InvalidGitUrl, errors.SourceUnreachable), match=r"submodule"):
            await w.add(git_server.url + "app/.git", submodules=True)


async def test_a_submodule_path_with_a_carriage_return_does_nothing(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    """CVE-2025-48384: the CR was lost on writing the configuration, and the checkout went through a symlink."""
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    head = run(app, "rev-parse", "HEAD")
    (app / ".gitmodules").write_text('[submodule "x"]\n\tpath = "x\r"\n\turl = ../../app/.git\n')
    (app / "x").symlink_to(".git/hooks")
    run(app, "add", ".gitmodules", "x")
    run(app, "update-index", "--add", "--cacheinfo", f"160000,{head},x\r")
    run(app, "commit", "-qm", "evil")
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(git_server.url + "app/.git", submodules=True)
        assert dict(ready.skipped) == {"submodule": 1, "symlink": 1}
        assert await w.paths() == [".gitmodules", "a.py"]


# --- hostile repositories and addresses -------------------------------------------------------------------------


async def test_hostile_trees_are_left_out_and_bounded(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    blob = run(app, "rev-parse", "HEAD:a.py")

    def tree(*entries: tuple[str, str, bytes]) -> str:
        data = b"".join(f"{mode} ".encode() + name + b"\0" + bytes.fromhex(oid) for mode, oid, name in entries)
        command = ["git", "-C", str(app), "hash-object", "-w", "-t", "tree", "--literally", "--stdin"]
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout.decode().strip()

    def point_to(tree_id: str, ref: str) -> None:
        run(app, "update-ref", f"refs/heads/{ref}", run(app, "commit-tree", "-m", "evil", tree_id))

    point_to(
        tree(("100644", blob, b"bidi\xe2\x80\xae.py"), ("100644", blob, b"caf\xe9.py"), ("100644", blob, b"ok.py")),
        "odd",
    )
    point_to(tree(("100644", blob, b"..")), "climbs")
    point_to(tree(("100644", blob, b".git")), "dotgit")
    bomb = tree(*[("100644", blob, f"f{n}".encode()) for n in range(10)])
    for _ in range(8):
        bomb = tree(*[("40000", bomb, f"d{n}".encode()) for n in range(10)])
    point_to(bomb, "bomb")
    async with world(tmp_path, **allowed, ingest_max_files=5000) as w:
        odd = await w.add(git_server.url + "app/.git", ref="odd")
        assert (dict(odd.skipped), odd.file_count) == ({"unsafe-path": 2}, 1)
        for ref in ("climbs", "dotgit"):  # git's own check refuses such trees as they come in
            with pytest.raises((errors.SourceUnreachable, errors.EmptySource)):
                await w.add(git_server.url + "app/.git", ref=ref)
        with pytest.raises(errors.LimitExceeded, match="files"):
            await w.add(git_server.url + "app/.git", ref="bomb")
        assert (await w.sync(odd.name)).state == source_pb2.SOURCE_STATE_READY, "the service keeps serving"


async def test_alternates_over_the_old_protocol_lead_nowhere(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    run(app, "update-server-info")
    with git_http.serving(tmp_path / "git") as inside:
        (app / ".git/objects/info").mkdir(exist_ok=True)
        (app / ".git/objects/info/http-alternates").write_text(f"{inside.url}app/.git/objects/\n")
        (app / ".git/objects/info/alternates").write_text("/etc\n")
        blob = run(app, "hash-object", "a.py")
        (app / ".git/objects" / blob[:2] / blob[2:]).unlink()
        git_server.dumb = True
        async with world(tmp_path, **allowed) as w:
            with pytest.raises(errors.CodegraftError):
                await w.add(git_server.url + "app/.git")
        assert inside.requests == []


@pytest.mark.parametrize("kind", ["git", "url"])
async def test_addresses_inside_the_house_are_refused(tmp_path: Path, kind: str) -> None:
    hosts = [
        "127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "[::1]", "0.0.0.0",
        "[::ffff:127.0.0.1]", "100.64.0.1", "[fe80::1]", "[64:ff9b::7f00:1]", "2130706433", "224.0.0.1",
    ]  # fmt: skip
    async with world(tmp_path, ingest_allowed_networks=(), ingest_allowed_urls=()) as w:
        for host in hosts:
            url = f"https://{host}/x"
            origin = {"git": {"url": url}} if kind == "git" else {"url": {"url": url}}
            added = await w.client.sources.add(PROJECT, source_pb2.Source(**origin))  # type: ignore[arg-type]
            with pytest.raises((errors.InvalidArgument, errors.SourceUnreachable)) as caught:
                await w.client.sources.wait(added.name)
            assert "public" in caught.value.message or "resolved" in caught.value.message, (host, caught.value.message)


async def test_a_redirect_into_the_house_is_refused(tmp_path: Path, git_server: GitServer) -> None:
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "secret.py").write_text("secret = 1\n")
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    with git_http.serving(tmp_path / "git") as inside:
        inside.dumb = True
        git_server.redirect = inside.url.rstrip("/")
        only = {"ingest_allowed_urls": (git_server.url,), "ingest_allowed_networks": ()}
        async with world(tmp_path, **only) as w:
            added = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": git_server.url + "secret.py"}))
            with pytest.raises(errors.InvalidArgument):
                await w.client.sources.wait(added.name)
            with pytest.raises(errors.SourceUnreachable) as caught:
                await w.add(git_server.url + "app/.git")
            assert "moved" in caught.value.hint
        assert inside.requests == []


async def test_urls_are_fetched_with_redirects_and_digest(tmp_path: Path, git_server: GitServer) -> None:
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "one.py").write_text("one = 1\n")
    with git_http.serving(tmp_path / "git") as target:
        target.dumb = True
        git_server.redirect = target.url.rstrip("/")
        async with world(tmp_path, ingest_allowed_urls=(git_server.url, target.url)) as w:
            added = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": git_server.url + "one.py?x=1"}))
            assert added.name.endswith("/one-py")
            assert (await w.client.sources.wait(added.name)).file_count == 1
            wrong = await w.client.sources.add(
                PROJECT, source_pb2.Source(url={"url": git_server.url + "one.py", "sha256": "0" * 64})
            )
            with pytest.raises(errors.UploadMismatch):
                await w.client.sources.wait(wrong.name)
        git_server.redirect = git_server.url.rstrip("/")
        async with world(tmp_path, ingest_allowed_urls=(git_server.url,)) as w:
            loop = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": git_server.url + "loop.py"}))
            with pytest.raises(errors.SourceUnreachable, match="too often"):
                await w.client.sources.wait(loop.name)
