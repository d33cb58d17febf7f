"""Resource names: ``projects/{project}/runs/{run}/checkpoints/{step}`` and their parts.

A name is the key of the resource in JetStream KV and the prefix of its artifact in the object store, so the ids in
it keep to characters that both allow.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time

from services.core.errors import InvalidName

PROJECT = "projects/{project}"
SOURCE = PROJECT + "/sources/{source}"
CREDENTIAL = PROJECT + "/credentials/{credential}"
UPLOAD = PROJECT + "/uploads/{upload}"
SNAPSHOT = PROJECT + "/snapshots/{snapshot}"
SCAN = PROJECT + "/scans/{scan}"
DATASET = PROJECT + "/datasets/{dataset}"
RUN = PROJECT + "/runs/{run}"
CHECKPOINT = RUN + "/checkpoints/{step}"
SERVING = PROJECT + "/serving"
KEY = "keys/{key}"
PROJECT_QUOTA = PROJECT + "/quota"
KEY_QUOTA = KEY + "/quota"

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter that looks like a digit


def check_id(value: str, field: str) -> str:
    """The value, when it is a valid id: 1 to 64 of a-z, 0-9 and inner hyphens (a SHA-256 fits).

    Raises:
        InvalidName: it is not; names the field.
    """
    if not _ID.fullmatch(value):
        raise InvalidName(
            f"{field} {value[:80]!r} is not a valid id",
            field=field,
            hint="Use 1 to 64 lower-case letters, digits and hyphens, with a letter or digit at both ends.",
        )
    return value


def parse(pattern: str, name: str, *, field: str = "name") -> dict[str, str]:
    """The ids in a name of the given pattern (:data:`SCAN` and the like).

    Raises:
        InvalidName: the name does not have the pattern's form; names the field.
    """
    parts, wanted = name.split("/"), pattern.split("/")
    if len(parts) != len(wanted) or any(
        not want.startswith("{") and part != want for part, want in zip(parts, wanted, strict=True)
    ):
        raise InvalidName(
            f"{field} {name[:200]!r} does not have the form {pattern}", field=field, hint=f"Give {pattern}."
        )
    return {
        want[1:-1]: check_id(part, f"{field} ({want[1:-1]})")
        for part, want in zip(parts, wanted, strict=True)
        if want.startswith("{")
    }


def build(pattern: str, **ids: str) -> str:
    """The name of the pattern with these ids, each checked.

    Raises:
        InvalidName: an id is not valid; names it.
    """
    for key, value in ids.items():
        check_id(value, key)
    return pattern.format(**ids)


def project_of(name: str) -> str:
    """``projects/{project}`` of any name below it."""
    return "/".join(name.split("/")[:2])


def new_id(prefix: str, *, request_id: str = "", scope: str = "") -> str:
    """A fresh id that sorts by creation time, or the one id that belongs to a request id within a scope.

    The second form makes Create calls idempotent without an index: the repeated call meets the first one's record.

    Args:
        prefix: one or a few letters that tell what the id names.
        request_id: the caller's idempotency key; empty for a fresh id.
        scope: what the request id is unique in (the parent's name).
    """
    if request_id:
        return prefix + "-" + hashlib.sha256(f"{scope}\0{request_id}".encode()).hexdigest()[:16]
    milliseconds = time.time_ns() // 1_000_000
    stamp = "".join(_ALPHABET[(milliseconds >> shift) & 31] for shift in range(40, -1, -5))
    return f"{prefix}-{stamp}{''.join(secrets.choice(_ALPHABET) for _ in range(4))}"
