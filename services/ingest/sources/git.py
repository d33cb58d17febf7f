"""Git repositories and bundles: fetched bare and shallow, read object by object, never checked out.

The repository is hostile until proven otherwise: no hooks, no submodules, no filters, no configuration but ours, only
the transports that are allowed, and nothing of it is ever written to a path it chooses.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.core.errors import BrokenBundle, EmptySource, InvalidArgument, InvalidGitUrl, SourceUnreachable
from services.ingest.files import FoundFile, Skipped, below, found, plain_path
from services.ingest.limits import Limits, Meter

_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@+-]{0,254}")
_SCP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[^:].*")
_HOST = re.compile(r"(?P<user>[^/@]*@)?[A-Za-z0-9\[][A-Za-z0-9.:\[\]-]*(/.*)?")
_CONFIG = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.symlinks": "false",
    "core.askPass": "true",
    "credential.helper": "",
    "fetch.fsckObjects": "true",
    "fetch.recurseSubmodules": "false",
    "gc.auto": "0",
    "http.followRedirects": "initial",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "init.defaultBranch": "main",
    "protocol.allow": "never",
    "protocol.https.allow": "always",
    "protocol.ssh.allow": "always",
    "submodule.recurse": "false",
    "transfer.bundleURI": "false",
}


@dataclass(frozen=True, slots=True)
class Repository:
    """A bare repository with one fetched commit."""

    folder: Path
    commit: str
    """Full commit id."""


def check_url(url: str, allowed: Sequence[str] = ()) -> None:
    """Accepts https and ssh URLs and user@host:path, and what begins with an allowed prefix.

    Raises:
        InvalidGitUrl: anything else, credentials in the URL, control characters, a leading hyphen.
    """
    hint = "Give https://host/path, ssh://user@host/path or user@host:path, without a password in it."
    if not url or len(url) > 2000 or not url.isprintable() or " " in url or url.startswith("-"):
        raise InvalidGitUrl("the URL is empty, too long or has characters that no URL has", field="git.url", hint=hint)
    if any(url.startswith(prefix) for prefix in allowed):
        return
    scheme, separator, rest = url.partition("://")
    if not separator:
        if _SCP.fullmatch(url) and "::" not in url:
            return
        raise InvalidGitUrl(f"{url[:200]!r} is no URL that is fetched", field="git.url", hint=hint)
    match = _HOST.fullmatch(rest)
    if scheme not in ("https", "ssh") or match is None:
        raise InvalidGitUrl(f"URLs of the form {scheme[:20]}:// are not fetched", field="git.url", hint=hint)
    user = match["user"] or ""
    if ":" in user or (user and scheme == "https"):
        raise InvalidGitUrl("the URL has credentials in it", field="git.url", hint=hint)


def check_ref(ref: str) -> None:
    """Raises InvalidArgument unless it can be a branch, a tag or a commit id; empty is fine."""
    if ref and (not _REF.fullmatch(ref) or ".." in ref or "@{" in ref or ref.endswith((".lock", "/"))):
        raise InvalidArgument(
            f"{ref[:100]!r} is no branch, tag or commit id", field="ref", hint="See `git check-ref-format`."
        )


def fetch(url: str, ref: str, folder: Path, limits: Limits, allowed: Sequence[str] = ()) -> Repository:
    """Fetches one commit of a remote repository, without its history.

    Args:
        ref: branch, tag or commit id; empty means the remote's HEAD.
        folder: an empty folder for the objects.
        allowed: URL prefixes that are allowed besides https and ssh.

    Raises:
        InvalidGitUrl, InvalidArgument: see check_url and check_ref.
        EmptySource: it has no commit.
        SourceUnreachable: git could not fetch it; with git's own words.
        LimitExceeded: it took too long.
    """
    check_url(url, allowed)
    check_ref(ref)
    extra = {}
    if any(url.startswith(prefix) for prefix in allowed):
        scheme = url.partition("://")[0] if "://" in url else "file"
        extra = {f"protocol.{scheme}.allow": "always"}
    _run(["init", "--quiet", "--bare", str(folder)], limits=limits)
    command = ["fetch", "--quiet", "--no-tags", "--depth=1", "--no-write-fetch-head", "--end-of-options", url]
    failed = _run([*command, f"+{ref or 'HEAD'}:refs/codegraft/it"], folder, limits, extra)
    if failed is not None:
        heads = _output(["ls-remote", "--end-of-options", url], folder, limits, extra)
        if heads is not None and not heads.strip():
            raise _empty("the repository has no commit")
        raise SourceUnreachable(
            f"git could not fetch {url}: {failed}",
            hint="Check the URL and the ref, and for a private repository its credential.",
        )
    return Repository(folder, _commit(folder, "refs/codegraft/it", limits))


def unbundle(bundle: Path, ref: str, folder: Path, limits: Limits) -> Repository:
    """Takes one commit out of a git bundle, which is verified first.

    Raises:
        BrokenBundle: it does not verify, or lacks the ref.
        InvalidArgument: see check_ref.
    """
    check_ref(ref)
    _run(["init", "--quiet", "--bare", str(folder)], limits=limits)
    hint = "Make it with `git bundle create FILE --all` in the repository."
    failed = _run(["bundle", "verify", "--quiet", str(bundle.absolute())], folder, limits)
    if failed is not None:
        raise BrokenBundle(f"the git bundle does not verify: {failed}", hint=hint)
    command = ["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(bundle.absolute())]
    failed = _run([*command, "+refs/*:refs/bundle/*"], folder, limits, {"protocol.file.allow": "always"})
    if failed is None and not ref:
        failed = _run([*command, "+HEAD:refs/codegraft/it"], folder, limits, {"protocol.file.allow": "always"})
    if failed is not None:
        raise BrokenBundle(f"the git bundle cannot be read: {failed}", hint=hint)
    names = ["refs/codegraft/it"] if not ref else [f"refs/bundle/heads/{ref}", f"refs/bundle/tags/{ref}", ref]
    for name in names:
        if (commit := _output(["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], folder, limits)) is not None:
            return Repository(folder, commit.strip())
    raise BrokenBundle(f"the git bundle has no {ref or 'HEAD'!r}", hint=hint)


def read(repository: Repository, subpath: str, limits: Limits) -> Iterator[FoundFile | Skipped]:
    """The regular files of the commit, in the order of its tree.

    Raises:
        LimitExceeded: there are more files or bytes than the limits allow.
        SourceUnreachable: objects are missing.
    """
    meter = Meter(limits)
    with _process(["cat-file", "--batch"], repository.folder) as (stdin, stdout):
        for mode, kind, size, object_id, raw in _tree(repository):
            meter.count_file()
            if kind == "commit":
                yield Skipped("submodule")
                continue
            if mode == "120000":
                yield Skipped("symlink")
                continue
            path = plain_path(raw, limits.max_path_bytes)
            if path is None:
                yield Skipped("unsafe-path")
                continue
            inside = below(path, subpath)
            if inside is None:
                continue
            if size > limits.max_file_bytes:
                yield Skipped("oversize")
                continue
            stdin.write(object_id.encode() + b"\n")
            stdin.flush()
            header = stdout.readline().split()
            if len(header) != 3 or header[1] != b"blob":
                raise SourceUnreachable("the repository lacks an object", hint="Run `git fsck` where it comes from.")
            data = stdout.read(int(header[2]))
            stdout.read(1)
            meter.count_bytes(len(data))
            yield found(inside, data, int(mode, 8))


def _tree(repository: Repository) -> Iterator[tuple[str, str, int, str, str]]:
    """(mode, kind, size, object id, path) of every entry."""
    command = ["ls-tree", "-r", "-z", "--long", "--full-tree", repository.commit]
    with _process(command, repository.folder) as (_, stdout):
        rest = b""
        while part := stdout.read(1 << 16):
            *entries, rest = (rest + part).split(b"\0")
            for entry in entries:
                about, _, path = entry.partition(b"\t")
                mode, kind, object_id, size = about.decode().split()
                yield mode, kind, 0 if size == "-" else int(size), object_id, path.decode(errors="surrogateescape")


def _commit(folder: Path, name: str, limits: Limits) -> str:
    commit = _output(["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], folder, limits)
    if commit is None or not _COMMIT.fullmatch(commit.strip()):
        raise SourceUnreachable("the ref names no commit", hint="Give a branch, a tag or a commit id.")
    return commit.strip()


def _empty(what: str) -> EmptySource:
    return EmptySource(what, hint="Push a commit first.")


def _environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    settings = _CONFIG | (extra or {})
    numbered = {}
    for number, (key, value) in enumerate(settings.items()):
        numbered[f"GIT_CONFIG_KEY_{number}"], numbered[f"GIT_CONFIG_VALUE_{number}"] = key, value
    kept = {name: os.environ[name] for name in ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
    return {
        **kept,
        **numbered,
        "GIT_CONFIG_COUNT": str(len(settings)),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oStrictHostKeyChecking=yes -oConnectTimeout=20",
        "HOME": "/nonexistent",
        "LC_ALL": "C",
    }


def _finish(
    arguments: Sequence[str], folder: Path | None, limits: Limits, extra: dict[str, str] | None
) -> subprocess.CompletedProcess[str]:
    command = ["git", *(["--git-dir", str(folder)] if folder else []), *arguments]
    try:
        return subprocess.run(
            command,
            env=_environment(extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limits.max_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SourceUnreachable(
            f"git did not finish within {limits.max_seconds:.0f} s",
            hint="Try again, or raise CODEGRAFT_INGEST_MAX_SECONDS.",
        ) from None
    except FileNotFoundError:
        raise SourceUnreachable("git is not installed where the service runs", hint="Install git there.") from None


def _run(
    arguments: Sequence[str],
    folder: Path | None = None,
    limits: Limits | None = None,
    extra: dict[str, str] | None = None,
) -> str | None:
    """None when git succeeded, else the last lines of what it said."""
    done = _finish(arguments, folder, limits or Limits(), extra)
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.strip().splitlines()[-3:])[:500] or f"git ended with {done.returncode}"


def _output(arguments: Sequence[str], folder: Path, limits: Limits, extra: dict[str, str] | None = None) -> str | None:
    """What git printed; None when it failed."""
    done = _finish(arguments, folder, limits, extra)
    return done.stdout if done.returncode == 0 else None


@contextmanager
def _process(arguments: Sequence[str], folder: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A running git command; ended in any case."""
    process = subprocess.Popen(
        ["git", "--git-dir", str(folder), *arguments],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin and process.stdout
    try:
        yield process.stdin, process.stdout
    finally:
        process.stdin.close()
        process.stdout.close()
        killer = threading.Timer(5, process.kill)
        killer.start()
        process.wait()
        killer.cancel()
