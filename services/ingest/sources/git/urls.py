"""Which git URLs and refs are let through to git."""

from __future__ import annotations

import re
from urllib.parse import urljoin, urlsplit

from services.core.errors import InvalidArgument, InvalidGitUrl
from services.ingest.sources.guard import Guard

_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@+#-]{0,254}")
_SCP = re.compile(r"(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*):(?P<path>[^:]*)")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*|[0-9a-f:.]+")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HINT = "Give https://host/path, ssh://user@host/path or user@host:path, without a password in it."


def check_url(url: str, guard: Guard, field: str = "git.url") -> str:
    """Accepts https and ssh URLs and user@host:path, and what the allow-list covers; returns it in the form of a URL.

    Raises:
        InvalidGitUrl: anything else, credentials in the URL, control characters, a leading hyphen.
    """

    def refuse(what: str) -> InvalidGitUrl:
        return InvalidGitUrl(what, field=field, hint=_HINT)

    if not url or len(url) > 2000 or not url.isascii() or not url.isprintable() or " " in url or url.startswith("-"):
        raise refuse("the URL is empty, too long or has characters that no URL has")
    if "://" not in url:
        match = _SCP.fullmatch(url)
        if match is None:
            raise refuse(f"{url[:200]!r} is no URL that is fetched")
        # A path without slash in front is relative to the home; servers of git take both for the same.
        url = f"ssh://{match['user']}@{match['host']}/{match['path'].lstrip('/')}"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise refuse(f"{url[:200]!r} is no URL") from None
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise refuse("the URL has credentials in it")
    if "::" in parts.scheme or parts.fragment or "%00" in url or "%0a" in url.lower() or "%0d" in url.lower():
        raise refuse("the URL has parts that no repository's URL has")
    if parts.scheme not in ("https", "ssh") and not (parts.scheme in ("http", "file") and guard.admits(url)):
        raise refuse(f"URLs of the form {parts.scheme[:20]}:// are not fetched")
    if parts.scheme == "file":
        return url
    if not parts.hostname or not _HOST.fullmatch(parts.hostname):
        raise refuse("the URL has no valid host")
    if parts.username is not None and not _USER.fullmatch(parts.username):
        raise refuse("the URL has no valid user")
    return url


def check_ref(ref: str, field: str = "ref") -> None:
    """Raises InvalidArgument unless it can be a branch, a tag or a commit id; empty is fine."""
    wrong = any(part in ref for part in ("..", "@{", "//")) or ref.endswith((".lock", "/", "."))
    if ref and (wrong or not _REF.fullmatch(ref)):
        raise InvalidArgument(
            f"{ref[:100]!r} is no branch, tag or commit id", field=field, hint="See `git check-ref-format`."
        )


def relative(url: str, to: str) -> str:
    """A submodule's URL, which may be relative ("../other.git") to its repository's URL."""
    if not url.startswith(("./", "../")):
        return url
    return urljoin(to.rstrip("/") + "/", url)


def place(url: str) -> str:
    """Scheme, host and port: where a credential may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or ''}"
