"""Sources: what there is and how it stands, live; new ones; their settings."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.routing import Route

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import source_pb2
from codegraft.ingest.v1.credential_pb2 import Credential
from services.core import names
from services.core.errors import InvalidArgument
from services.gateway.console import live
from services.gateway.console.forms import Form
from services.gateway.console.visit import House, Visit, if_allowed

SPLITS = {"auto": Split.SPLIT_AUTO, "train": Split.SPLIT_TRAIN, "test": Split.SPLIT_TEST}


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/p/{project}/sources", show),
        house.route("/p/{project}/sources", add, post=True),
        house.route("/p/{project}/sources/-/live", follow),
        house.route("/p/{project}/sources/{source}", one),
        house.route("/p/{project}/sources/{source}", save, post=True),
        house.route("/p/{project}/sources/{source}/sync", sync, post=True),
        house.route("/p/{project}/sources/{source}/remove", remove, post=True),
    ]


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/sources"""
    credentials = await if_allowed(_credentials(visit))
    return visit.page("sources.html", sources=await _sources(visit), credentials=credentials)


async def _sources(visit: Visit) -> list[source_pb2.Source]:
    return [each async for each in visit.client.sources.list(visit.project)]


async def _credentials(visit: Visit) -> list[Credential]:
    return [each async for each in visit.client.credentials.list(visit.project)]


async def follow(visit: Visit) -> Response:
    """GET /console/p/acme/sources/-/live: each source after every change; all of them at first, and whenever somebody
    added or removed one."""
    sources = {source.name: source for source in await _sources(visit)}

    async def events() -> AsyncGenerator[bytes, None]:
        shown: set[str] | None = None
        async for batch in live.Merged([visit.client.sources.watch_all(visit.project)]).batches():
            if not batch:
                yield live.STILL_HERE
                continue
            for change in batch:
                sources.pop(change.removed or change.source.name, None)
                if not change.removed:
                    sources[change.source.name] = change.source
            if shown == sources.keys():
                for name in {change.source.name for change in batch if not change.removed}:
                    yield live.message("part", visit.part("parts/source.html", source=sources[name]))
                continue
            shown, by_name = set(sources), sorted(sources.values(), key=lambda source: source.name)
            yield live.message("part", visit.part("parts/sources.html", sources=by_name))

    return live.answer(visit.request, events())


async def add(visit: Visit) -> Response:
    """POST /console/p/acme/sources"""
    form = visit.form
    source = source_pb2.Source()
    upload, kind = form.text("upload"), form.text("kind")
    match kind:
        case "git":
            source.git.CopyFrom(
                source_pb2.GitSource(
                    url=form.text("url"),
                    ref=form.text("ref"),
                    subpath=form.text("subpath"),
                    credential=_credential(visit, form.text("credential")),
                    submodules=form.has("submodules"),
                )
            )
        case "bundle":
            source.bundle.CopyFrom(
                source_pb2.BundleSource(upload=upload, ref=form.text("ref"), subpath=form.text("subpath"))
            )
        case "archive":
            source.archive.CopyFrom(source_pb2.ArchiveSource(upload=upload, subpath=form.text("subpath")))
        case "file":
            source.file.CopyFrom(source_pb2.FileSource(upload=upload, path=form.text("path")))
        case "url":
            source.url.CopyFrom(source_pb2.UrlSource(url=form.text("url"), sha256=form.text("sha256")))
        case _:
            raise InvalidArgument(
                f"{kind[:40]!r} is no kind of source", field="kind", hint="Take git, bundle, archive, file or url."
            )
    _settle(source, form)
    await visit.client.sources.add(visit.project, source, source_id=form.text("source_id"))
    return visit.done(visit.way("/sources"))


def _credential(visit: Visit, given: str) -> str:
    return names.build(names.CREDENTIAL, project=visit.project, credential=given) if given else ""


def _settle(source: source_pb2.Source, form: Form) -> None:
    """What every kind of source has."""
    if form.text("split", "auto") not in SPLITS:
        raise InvalidArgument("no such part of the dataset", field="split", hint="Take auto, train or test.")
    source.split = SPLITS[form.text("split", "auto")]
    rules = [("test_masks", Split.SPLIT_TEST), ("train_masks", Split.SPLIT_TRAIN)]
    del source.split_rules[:]
    source.split_rules.extend(
        source_pb2.SplitRule(pattern=mask, split=part) for field, part in rules for mask in form.lines(field)
    )
    source.exclude[:], source.include[:] = form.lines("exclude"), form.lines("include")
    source.honour_gitattributes = form.has("honour_gitattributes")
    source.sync_interval_seconds = 60 * (form.whole("sync_minutes") or 0)


def _name(visit: Visit) -> str:
    return names.build(names.SOURCE, project=visit.project, source=visit.request.path_params["source"])


async def one(visit: Visit) -> Response:
    """GET /console/p/acme/sources/app: its state in full, and its settings."""
    source = await visit.client.sources.get(_name(visit))
    return visit.page("source.html", source=source, credentials=await if_allowed(_credentials(visit)))


async def save(visit: Visit) -> Response:
    """POST /console/p/acme/sources/app; what it is fetched from stays unless the form says otherwise."""
    form, source = visit.form, await visit.client.sources.get(_name(visit))
    before = source.SerializeToString()
    source.etag = form.text("etag")
    if source.HasField("git"):
        source.git.url, source.git.ref = form.text("url"), form.text("ref")
        source.git.subpath, source.git.submodules = form.text("subpath"), form.has("submodules")
        if form.has("credential"):  # absent where one's key may not see them
            source.git.credential = _credential(visit, form.text("credential"))
        changed = source_pb2.Source.FromString(before).git != source.git
    else:
        changed = False
    if not changed:  # a source that is told its origin is fetched again
        source.ClearField(source.WhichOneof("origin") or "git")
    _settle(source, form)
    await visit.client.sources.update(source)
    return visit.done(visit.way("/sources"))


async def sync(visit: Visit) -> Response:
    """POST /console/p/acme/sources/app/sync"""
    await visit.client.sources.sync(_name(visit))
    return visit.done(visit.way("/sources"))


async def remove(visit: Visit) -> Response:
    """POST /console/p/acme/sources/app/remove; with its snapshots when that is asked for."""
    if not visit.form.has("forget"):
        await visit.client.sources.remove(_name(visit))
        return visit.done(visit.way("/sources"))
    await visit.client.sources.forget(_name(visit))
    return visit.done(visit.way("/sources"))
