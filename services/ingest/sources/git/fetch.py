"""Fetching one commit: bare, without history, and no more of its files than are wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import BrokenBundle, EmptySource, SourceUnreachable
from services.ingest.limits import Meter
from services.ingest.sources.git.process import Done, Git
from services.ingest.sources.git.remote import NAME, Remote
from services.ingest.sources.git.urls import check_ref

_REF = "refs/codegraft/it"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_FETCH = ("fetch", "--progress", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
_REFUSED = re.compile(
    r"Authentication failed|could not read (Username|Password)|Permission denied|\b40[13]\b|publickey"
)
_MOVED = re.compile(r"\b30[12378]\b|redirect", re.IGNORECASE)
_HOST_KEY = re.compile(r"Host key verification failed|IDENTIFICATION HAS CHANGED", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Repository:
    """A bare repository with one fetched commit."""

    git: Git
    """Knows no remote: reading it fetches nothing."""
    commit: str
    """Full commit id."""
    ref: str = ""
    """As it was asked for."""
    remote: Remote | None = None
    """Where files that were left out can be asked for by their ids."""
    has_contents: bool = True
    """Whether only very large files were left out."""


def moved(remote: Remote, ref: str, commit: str) -> bool:
    """Whether the ref leads to another commit than the given one by now.

    Raises:
        SourceUnreachable: see fetch.
    """
    if ref == commit:
        return False
    _prepare(remote.git)
    done = remote.git.run("ls-remote", NAME, ref or "HEAD", *([f"{ref}^{{}}"] if ref else []))
    if done.code:
        raise _unreachable(remote, done)
    lines = (line.partition("\t") for line in done.output.decode(errors="replace").splitlines())
    ids = {name: object_id for object_id, _, name in lines}
    # git's own order of looking a short name up; an annotated tag leads on to its commit ("^{}").
    for name in (ref or "HEAD", f"refs/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"):
        if name in ids:
            return ids.get(name + "^{}", ids[name]) != commit
    return True


def fetch(remote: Remote, ref: str, *, contents: bool = True) -> Repository:
    """Fetches one commit of a remote repository, without its history and its very large files.

    Into a repository that has an earlier commit with all its files only what is new is transferred.

    Args:
        ref: branch, tag or commit id; empty means the remote's HEAD.
        contents: fetch files too; else the commit and its trees only, where the server can.

    Raises:
        InvalidArgument: see check_ref.
        EmptySource: it has no commit.
        SourceUnreachable: git could not fetch it; with git's own words.
        LimitExceeded: it took too long, or is too large.
    """
    check_ref(ref)
    git = remote.git
    _prepare(git)
    left_out = _large(git) if contents else "blob:none"
    done = git.run(*_FETCH, "--depth=1", f"--filter={left_out}", NAME, f"+{ref or 'HEAD'}:{_REF}")
    if done.code:
        heads = git.run("ls-remote", NAME)
        if heads.code == 0 and not heads.output.strip():
            raise EmptySource("the repository has no commit", hint="Push a commit first.")
        raise _unreachable(remote, done)
    alone = _alone(git)
    return Repository(alone, _commit(alone, _REF), ref, remote, has_contents=contents)


def fetch_objects(repository: Repository, object_ids: list[str]) -> None:
    """Brings files that a fetch left out: by their ids, or all of them where the server knows no such request.

    Raises:
        SourceUnreachable: the server does not give them.
    """
    remote = repository.remote
    if remote is None or not object_ids:
        return
    remote.git.meter.tell("fetching changed files", 0, len(object_ids))
    given = "".join(f"{object_id}\n" for object_id in object_ids).encode()
    config = {
        **remote.git.config,
        f"remote.{NAME}.promisor": "true",
        f"remote.{NAME}.partialclonefilter": "blob:none",
        # Told of our commit, the server would believe that we have its files.
        "fetch.negotiationAlgorithm": "noop",
    }
    git = Git(remote.git.folder, remote.git.meter, config, remote.git.environment)
    done = git.run(*_FETCH, "--filter=blob:none", NAME, "--stdin", stdin=given)
    if done.code:
        target = f"+{repository.ref or 'HEAD'}:{_REF}"
        done = git.run(*_FETCH, "--refetch", "--depth=1", f"--filter={_large(git)}", NAME, target)
    if done.code:
        raise _unreachable(remote, done)
    _alone(git)


def unbundle(bundle: Path, ref: str, folder: Path, meter: Meter) -> Repository:
    """Takes one commit out of a git bundle, which is verified first.

    Raises:
        BrokenBundle: it does not verify, or lacks the ref.
        InvalidArgument: see check_ref.
    """
    check_ref(ref)
    git = Git(folder, meter, {"protocol.file.allow": "always"})
    _prepare(git)
    hint = "Make it with `git bundle create FILE --all` in the repository."
    path = str(bundle.absolute())
    done = git.run("bundle", "verify", "--quiet", path)
    if done.code:
        raise BrokenBundle(f"the git bundle does not verify: {done.complaint}", hint=hint)
    done = git.run(*_FETCH, path, "+refs/*:refs/bundle/*")
    if not done.code and not ref:
        done = git.run(*_FETCH, path, f"+HEAD:{_REF}")
    if done.code:
        raise BrokenBundle(f"the git bundle cannot be read: {done.complaint}", hint=hint)
    alone = _alone(git)
    for name in [_REF] if not ref else [f"refs/bundle/tags/{ref}", f"refs/bundle/heads/{ref}", ref]:
        found = alone.run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if not found.code:
            return Repository(alone, found.output.decode().strip())
    raise BrokenBundle(f"the git bundle has no {ref or 'HEAD'!r}", field="bundle.ref", hint=hint)


def _large(git: Git) -> str:
    return f"blob:limit={git.meter.limits.max_file_bytes + 1}"


def _prepare(git: Git) -> None:
    """Makes the bare repository unless it is there. By hand, so that no template adds hooks."""
    if (git.folder / "HEAD").exists():
        return
    for name in ("objects/info", "objects/pack", "refs"):
        (git.folder / name).mkdir(parents=True, exist_ok=True)
    (git.folder / "HEAD").write_text("ref: refs/heads/main\n")
    _write_config(git)


def _write_config(git: Git) -> None:
    (git.folder / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = true\n")


def _alone(git: Git) -> Git:
    """The repository without any memory of its remote: what is missing stays missing, instead of being fetched."""
    _write_config(git)
    return Git(git.folder, git.meter)


def _commit(git: Git, name: str) -> str:
    found = git.run("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    commit = found.output.decode().strip()
    if found.code or not _COMMIT.fullmatch(commit):
        raise SourceUnreachable("the ref names no commit", hint="Give a branch, a tag or a commit id.")
    return commit


def _unreachable(remote: Remote, done: Done) -> SourceUnreachable:
    said = done.complaint
    if _HOST_KEY.search(done.errors):
        hint = "Give the credential the host's key: the output of `ssh-keyscan HOST`, after a comparison."
    elif _REFUSED.search(done.errors):
        hint = "Give the source a credential that may read the repository; a missing repository looks the same."
    elif _MOVED.search(said):
        hint = "The repository has moved: redirects are not followed, so give its new URL."
    else:
        hint = "Check the URL and the ref, and that the service's host can reach it."
    return SourceUnreachable(f"git could not fetch {remote.url}: {said}", field="git.url", hint=hint)
