"""docs/api/, made from the comments of protos/, the policy of services/core/auth and the error table: ``make docs``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from services.core import errors
from services.core.auth import policy
from services.core.auth.caller import Role
from tools import contract
from tools.contract import Field, Message, Method, Package, Service

FOLDER = contract.ROOT / "docs" / "api"
MADE = "<!-- Made from protos/, services/core/auth/policy.py and services/core/errors.py by: make docs -->\n"
_SERVED_BY = {"access": "ingest"}
"""Packages whose process has another name."""
_WELL_KNOWN = "https://protobuf.dev/reference/protobuf/google.protobuf/#"
_ERRORS = re.compile(r"\s*^Errors: ([A-Z_,\s]+)\.\s*", re.M)
_INDEX = """# API reference

{made}
Four gRPC services. The RPCs below can be called with any client generated from [protos/](../../protos/codegraft), with
the [Python client](../../README.md#from-a-backend-service), or through the servers' reflection
(`grpc.reflection.v1alpha`). Every server also answers `grpc.health.v1`.

| package | process | services |
|---|---|---|
{packages}

Messages that several packages share are in [common](common.md); those that go over NATS in [event](event.md), explained
by [events.md](../events.md). `codegraft.*.v1` only grows: fields and RPCs are added, none is renamed, removed or given
another number (`buf breaking` holds every change against that).

## Conventions

- **Credentials.** Every call sends the metadata `authorization: Bearer …` with an API key or an OIDC token; only health
  checks need none. What each RPC asks of its caller is told beside it, and what the roles may do by
  [security.md](../security.md#what-a-caller-may-do).
- **Names.** A resource is named `projects/{{project}}/…`; an id has 1 to 64 of a-z, 0-9 and inner hyphens. Most RPCs
  take the name in `name`, and what is created or listed below something in `parent`.
- **Lists** take `page_size` and `page_token` and give `next_page_token`. A page token belongs to the list that gave it.
- **Creating** takes `request_id`: the same one again gives what the first call made, and REQUEST_ID_REUSED when the
  request is another. Without one, a repeated call may make a second thing.
- **Changing** takes `etag`: when it is given and the thing was changed since, the answer is ETAG_MISMATCH.
- **Watching** streams the thing as it is, then every change; of several quick changes only the last may come. A replica
  that shuts down ends such streams with SHUTTING_DOWN: watch again.
- **Metadata.** `x-request-id` (letters, digits, `.`, `_`, `-`, at most 128) is taken over into logs and the audit log;
  `traceparent` goes on with the caller's trace. Deadlines are heeded, also by the calls that one call makes.
- **Messages** that a server takes have at most 4 MiB; contents are sent in chunks of at most 1 MiB.
- **Units** are in the names or the comments: seconds, bytes, tokens, nats per token. A field without `optional` is
  empty or 0 when it is not set, and the comment says what that means.

## RPCs

| RPC | role | in |
|---|---|---|
{rpcs}

## Errors

Every failure is a `google.rpc.Status` with an `ErrorInfo` of the domain `{domain}` and one of these reasons. Beside it
stand, where they apply, `BadRequest` (the field at fault), `LocalizedMessage` (how to mend it) and `RetryInfo` (when to
come back). An RPC lists the errors of its own. Besides them each can give UNAUTHENTICATED, KEY_EXPIRED, KEY_REVOKED,
INVALID_TOKEN, PERMISSION_DENIED, CANCELLED, DEADLINE_EXCEEDED, SHUTTING_DOWN, and INTERNAL for a defect.

A call that ended with UNAVAILABLE, or with RESOURCE_EXHAUSTED and `RetryInfo`, may be repeated as it is; one that ended
with ABORTED after reading again.

| reason | code | when |
|---|---|---|
{errors}
"""


def pages() -> dict[str, str]:
    """Every page of docs/api by its file name."""
    found = {f"{package.short}.md": _page(package) for package in contract.packages().values()}
    return {"README.md": _index(), **found}


# --- the index ----------------------------------------------------------------------------------------------------


def _index() -> str:
    served = [package for package in contract.packages().values() if package.services]
    services = [(package, service) for package in served for service in package.services]
    return _INDEX.format(
        made=MADE,
        packages="\n".join(
            _row(
                f"[{package.name}]({package.short}.md)",
                _SERVED_BY.get(package.short, package.short),
                ", ".join(_link(package.short, _last(service.name)) for service in package.services),
            )
            for package in served
        ),
        rpcs="\n".join(
            _row(
                f"[{_last(service.name)}.{method.name}]({package.short}.md#{method.name.lower()})",
                _role(_rule(service, method)),
                _where(_rule(service, method)),
            )
            for package, service in services
            for method in service.methods
        ),
        domain=errors.DOMAIN,
        errors="\n".join(
            _row(f'<a id="{error.reason.lower()}"></a>{error.reason}', error.code, _cell(_first(error)))
            for error in sorted(errors.all_errors(), key=lambda error: (error.code, error.reason))
            if error is not errors.CodegraftError
        ),
    )


def _first(error: type[errors.CodegraftError]) -> str:
    return " ".join((error.__doc__ or "").split("\n\n")[0].split())


# --- one package --------------------------------------------------------------------------------------------------


def _page(package: Package) -> str:
    parts = [f"# {package.name}\n", MADE, _about(package)]
    shown: set[str] = set()
    for service in package.services:
        parts.append(f"## {_last(service.name)}\n\n{_escaped(service.comment)}\n")
        for method in service.methods:
            parts.append(_rpc(package, service, method))
            shown |= {method.request, method.response}
    rest = [message for message in package.messages if message.name not in shown]
    for is_enum, title in ((False, "Messages"), (True, "Enums")):
        if found := [message for message in rest if message.is_enum is is_enum]:
            parts.append(f"## {title}\n")
            parts += [
                f"### {_last(message.name)}\n\n{_escaped(message.comment)}\n\n{_fields(package, message)}"
                for message in found
            ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _about(package: Package) -> str:
    process = _SERVED_BY.get(package.short, package.short)
    if package.services:
        return f"Served by the process {process}. Conventions and errors: [API reference](README.md)."
    if package.short == "event":
        return "What is published over NATS: [events.md](../events.md) tells when, by whom and for whom."
    return "Shared by the other packages. Conventions and errors: [API reference](README.md)."


def _rpc(package: Package, service: Service, method: Method) -> str:
    before, reasons, after = _ERRORS.split(method.comment)
    rule = _rule(service, method)
    full = f"/{service.name}/{method.name}"
    lines = [
        f"### {method.name}\n",
        f"`{full}`: {_streams(method)}.\n",
        _escaped("\n\n".join(part for part in (before, after) if part)) + "\n",
        f"- Role: {_role(rule)}, in {_where(rule)}." + (" Recorded in the audit log." if policy.changes(full) else ""),
        f"- Errors: {', '.join(f'[{one}](README.md#{one.lower()})' for one in re.findall(r'[A-Z_]+', reasons))}.\n",
    ]
    known = contract.messages()
    for name in (method.request, method.response):
        fields = _fields(package, known[name])
        lines.append(f"**{_last(name)}**" + (f"\n\n{fields}" if known[name].fields else " has no fields.\n"))
    return "\n".join(lines)


def _streams(method: Method) -> str:
    match method.request_stream, method.response_stream:
        case False, False:
            return "one request, one response"
        case True, False:
            return "a stream of requests, one response"
        case False, True:
            return "one request, a stream of responses"
        case _:
            return "a stream of requests, a stream of responses"


def _rule(service: Service, method: Method) -> policy.Rule:
    rule = policy.rule_of(f"/{service.name}/{method.name}")
    if rule is None:
        raise SystemExit(f"{service.name}.{method.name} has no rule in services/core/auth/policy.py")
    return rule


def _role(rule: policy.Rule) -> str:
    return "anybody" if rule.role is None else Role(rule.role).name.lower()


def _where(rule: policy.Rule) -> str:
    """In which projects the caller must have the role."""
    if rule.all_projects:
        return "all projects"
    if rule.handler:
        return "the caller's own projects"
    if not rule.fields:
        return "any project"
    names = [re.sub(r"projects/\{(\w+)\}", r"\1", path) for path in rule.fields]
    return "the project of " + ", ".join(f"`{name}`" for name in names)


def _fields(package: Package, message: Message) -> str:
    if message.is_enum:
        rows = [_row(f"`{one.name}`", str(one.number), _cell(one.comment)) for one in message.fields]
        return "\n".join(["| value | number | meaning |", "|---|---|---|", *rows, ""])
    if not message.fields:
        return "Has no fields.\n"
    rows = []
    for oneof, fields in groupby(message.fields, key=lambda one: (one.oneof, one.oneof_comment)):
        if oneof[0]:
            rows.append(_row(f"`{oneof[0]}`", "one of:", "", _cell(oneof[1])))
        rows += [
            _row(
                f"`{one.name}`",
                _type(package, one) + (f" in `{one.oneof}`" if one.oneof else ""),
                str(one.number),
                _cell(one.comment),
            )
            for one in fields
        ]
    return "\n".join(["| field | type | number | meaning |", "|---|---|---|---|", *rows, ""])


def _type(package: Package, one: Field) -> str:
    name = _reference(package, one)
    if one.key:
        return f"map of {one.key} to {name}"
    return f"{one.label} {name}".strip()


def _reference(package: Package, one: Field) -> str:
    if one.is_scalar:
        return one.type
    last = _last(one.type)
    if one.type.startswith("google.protobuf."):
        return f"[{last}]({_WELL_KNOWN}{last.lower()})"
    short = one.type.split(".")[1]
    return _link("" if short == package.short else short, last)


def _link(page: str, heading: str) -> str:
    return f"[{heading}]({f'{page}.md' if page else ''}#{heading.lower()})"


# --- text ---------------------------------------------------------------------------------------------------------


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(_escaped(text).replace("|", "\\|").split())


def _escaped(text: str) -> str:
    """Comments are plain text, with code between backticks: what else Markdown would read is not meant."""
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[])", r"\\\1", part) for part in re.split(r"(`[^`]*`)", text)
    )


def write(found: Iterable[tuple[str, str]]) -> None:
    """Makes the folder consist of these pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = dict(found)
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(pages().items())
