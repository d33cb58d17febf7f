"""The policy: what every RPC asks of its caller. One table; an RPC that is not in it is denied to everybody.

A rule names the role, and where the request says which projects the call is about. Those are fields with resource
names, checked before any handler runs: the first must name something of one of the caller's projects, the others may be
empty. A caller of all projects is not asked for names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from services.core import names
from services.core.auth.caller import Caller, Role
from services.core.errors import InvalidName, PermissionDenied


@dataclass(frozen=True, slots=True)
class Rule:
    """What one RPC asks for. Make it with one of the functions below."""

    role: Role | None
    """None: whoever calls."""
    fields: tuple[str, ...] = ()
    """Paths of the fields with resource names; ``projects/{project_id}`` for a field that has a mere id."""
    all_projects: bool = False
    """Only for callers of all projects: what it touches belongs to none of them alone."""
    handler: bool = False
    """The handler gives each caller what is its own."""


PUBLIC = Rule(None)
"""Tells nothing about anybody."""


def named(role: Role, *fields: str) -> Rule:
    """About the projects of these resource names."""
    return Rule(role, fields)


def shared(role: Role) -> Rule:
    """About nothing of a project: the same for every caller."""
    return Rule(role)


def everywhere(role: Role) -> Rule:
    """About all projects."""
    return Rule(role, all_projects=True)


def own(role: Role) -> Rule:
    """The handler looks at :func:`services.core.auth.caller.current`."""
    return Rule(role, handler=True)


R, C, W, O = Role.READER, Role.COMPLETER, Role.CONTRIBUTOR, Role.OPERATOR  # noqa: E741
_ORIGIN = ("git.credential", "bundle.upload", "archive.upload", "file.upload")
_SOURCE = tuple(f"source.{field}" for field in _ORIGIN)

POLICY: dict[str, dict[str, Rule]] = {
    "grpc.health.v1.Health": {"Check": PUBLIC, "List": PUBLIC, "Watch": PUBLIC},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": shared(R)},
    "codegraft.access.v1.WorkerService": {"ListWorkers": everywhere(R)},
    "codegraft.access.v1.AccessService": {
        "CreateKey": own(O),
        "ListKeys": own(O),
        "RotateKey": own(O),
        "RevokeKey": own(O),
        "GetCaller": own(R),
    },
    "codegraft.access.v1.QuotaService": {"GetQuota": own(R), "SetQuota": own(O)},
    "codegraft.access.v1.UsageService": {"GetUsage": own(R)},
    "codegraft.access.v1.AuditService": {"ListAuditRecords": named(O, "parent")},
    "codegraft.ingest.v1.ProjectService": {
        "CreateProject": named(O, "projects/{project_id}"),
        "GetProject": named(R, "name"),
        "ListProjects": own(R),
        "UpdateProject": named(W, "project.name"),
        "DeleteProject": named(O, "name"),
    },
    "codegraft.ingest.v1.SourceService": {
        "CreateSource": named(W, "parent", *_SOURCE),
        "GetSource": named(R, "name"),
        "ListSources": named(R, "parent"),
        "UpdateSource": named(W, "source.name", *_SOURCE),
        "SyncSource": named(W, "name"),
        "DeleteSource": named(W, "name"),
        "ForgetSource": named(O, "name"),
        "WatchSource": named(R, "name"),
        "WatchSources": named(R, "parent"),
    },
    "codegraft.ingest.v1.UploadService": {
        "UploadContent": named(W, "header.parent"),
        "GetUpload": named(W, "parent"),
    },
    "codegraft.ingest.v1.SnapshotService": {
        "CreateSnapshot": named(W, "parent"),
        "GetSnapshot": named(R, "name"),
        "ListSnapshots": named(R, "parent"),
        "ListSnapshotFiles": named(R, "parent"),
        "DiffSnapshots": named(R, "base", "target"),
        "DeleteSnapshot": named(O, "name"),
        "CollectGarbage": everywhere(O),
    },
    "codegraft.ingest.v1.CredentialService": {
        "CreateCredential": named(O, "parent"),
        "GetCredential": named(W, "name"),
        "ListCredentials": named(W, "parent"),
        "UpdateCredential": named(O, "credential.name"),
        "DeleteCredential": named(O, "name"),
    },
    "codegraft.scanner.v1.ScanService": {
        "CreateScan": named(W, "parent", "snapshot"),
        "GetScan": named(R, "name"),
        "ListScans": named(R, "parent"),
        "WatchScan": named(R, "name"),
        "WatchScans": named(R, "parent"),
        "CancelScan": named(W, "name"),
        "ListVerdicts": named(R, "parent"),
        "GetDataset": named(R, "name"),
        "ListDatasets": named(R, "parent"),
    },
    "codegraft.trainer.v1.RunService": {
        "PlanRun": named(W, "parent", "dataset"),
        "CreateRun": named(W, "parent", "dataset", "initial_checkpoint"),
        "GetRun": named(R, "name"),
        "ListRuns": named(R, "parent"),
        "WatchRun": named(R, "name"),
        "WatchRuns": named(R, "parent"),
        "CancelRun": named(W, "name"),
        "PauseRun": named(W, "name"),
        "ResumeRun": named(W, "name"),
        "ListCheckpoints": named(R, "parent"),
        "GetCheckpoint": named(R, "name"),
        "GetBestCheckpoint": named(R, "parent"),
        "KeepCheckpoint": named(W, "name"),
    },
    "codegraft.trainer.v1.AdapterService": {
        "DownloadCheckpoint": named(W, "name"),  # what was learned from the code, for good: no key of an editor's
        "ImportAdapter": named(W, "header.parent"),
    },
    "codegraft.trainer.v1.ModelService": {
        "ListModels": shared(R),
        "GetModel": shared(R),
        "PushModel": everywhere(O),
    },
    "codegraft.inference.v1.CompletionService": {
        "Complete": named(C, "parent", "adapter.checkpoint"),
        "Chat": named(C, "parent", "adapter.checkpoint"),
        "Score": named(C, "parent", "adapter.checkpoint"),
        "ListModels": shared(R),
    },
    "codegraft.inference.v1.ServingService": {
        "SetServing": named(O, "parent", "checkpoint", "split.checkpoint"),
        "GetServing": named(R, "parent"),
        "WatchServing": named(R, "parent"),
        "ApproveServing": named(O, "parent", "checkpoint"),
        "ListAdapters": everywhere(R),
        "LoadAdapter": named(O, "checkpoint"),
        "UnloadAdapter": named(O, "checkpoint"),
    },
    "codegraft.inference.v1.FeedbackService": {
        "RecordFeedback": named(C, "parent"),
        "GetAcceptance": named(R, "parent"),
        "ListKeptCompletions": named(O, "parent"),  # what people wrote
        "DeleteKeptCompletions": named(O, "parent"),
    },
}


def rule_of(method: str) -> Rule | None:
    """The rule of ``/package.Service/Method``; None when the table has none."""
    service, _, name = method.lstrip("/").partition("/")
    return POLICY.get(service, {}).get(name)


_READING = (
    "Get",
    "List",
    "Watch",
    "Check",
    "Server",
    "Complete",
    "Chat",
    "Score",
    "Plan",
    "Diff",
    "Download",
    "Record",
)
"""How the names of RPCs begin that change nothing. What is recorded are counts, at every suggestion of every editor."""


def changes(method: str) -> bool:
    """Whether the RPC may change something, so that it is recorded."""
    return rule_of(method) is not None and not method.rpartition("/")[2].startswith(_READING)


def resources(method: str, request: Any) -> list[str]:
    """The resource names in the request that the rule looks at."""
    rule = rule_of(method)
    return [name for path in (rule.fields if rule else ()) for name in _values(request, path) if name]


def about(caller: Caller, method: str, request: Any) -> Caller:
    """The caller as far as this call goes: of those of its projects that the request names."""
    if caller.projects is None:
        return caller
    named = {names.project_of(name) for name in resources(method, request) if name.startswith("projects/")}
    return replace(caller, projects=caller.projects & named)


def check(caller: Caller, method: str, request: Any) -> None:
    """Returns when the caller may make this call.

    Raises:
        PermissionDenied: it may not; says whether by its role, its projects, or because nobody may.
    """
    rule = rule_of(method)
    if rule is None:
        raise PermissionDenied(f"the policy has no rule for {method}: nobody may call it", method=method)
    if rule.role is None:
        return
    if caller.role < rule.role:
        raise PermissionDenied(
            f"{caller.subject} is {_word(caller.role)}; {method} asks for {_word(rule.role)}",
            hint="Use a key with that role.",
            role=rule.role.name.lower(),
        )
    if caller.projects is None:
        return
    if rule.all_projects:
        raise PermissionDenied(
            f"{method} is about all projects, {caller.subject} is not", hint="Use a key of all projects."
        )
    for place, path in enumerate(rule.fields):
        for name in _values(request, path):
            if name or not place:
                _check_name(caller, path, name)


def _check_name(caller: Caller, path: str, name: str) -> None:
    project = names.project_of(name)
    if project in (caller.projects or ()) and _is_plain(name):
        return
    raise PermissionDenied(
        f"{caller.subject} may not use {name[:200] or 'an empty name'!r}: it is in no project of its own",
        field=path if not path.startswith("projects/") else path[10:-1],
        hint="Use a key of that project.",
        project=project,
    )


def _is_plain(name: str) -> bool:
    """Whether every part of the name is an id: a name such as projects/mine/../other leads elsewhere."""
    try:
        for part in name.split("/"):
            names.check_id(part, "name")
    except InvalidName:
        return False
    return True


def _values(request: Any, path: str) -> Iterator[str]:
    if path.startswith("projects/{"):
        yield f"projects/{getattr(request, path[len('projects/{') : -1])}"
        return
    for part in path.split("."):
        request = getattr(request, part)
    yield request


def _word(role: Role) -> str:
    name = role.name.lower()
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
