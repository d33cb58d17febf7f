"""The console's sources: every kind is added as its form says, state is live, files go on from where they stopped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

from codegraft.common.v1.job_pb2 import Failure, Progress
from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import source_pb2 as pb
from codegraft.ingest.v1.credential_pb2 import CREDENTIAL_KIND_SSH_KEY, Credential, ListCredentialsResponse
from codegraft.ingest.v1.upload_pb2 import GetUploadResponse, Upload, UploadContentResponse
from services.core import errors
from tests.contract.console_world import EVIL, Browser, Page, check, later

pytest_plugins = ["tests.contract.console_fixtures"]
HERE = "/console/p/acme/sources"
APP = "projects/acme/sources/app"


def script(browser: Browser, *sources: pb.Source) -> None:
    browser.services.scripts["ListSources"] = [pb.ListSourcesResponse(sources=sources)]
    browser.services.scripts["GetSource"] = [pb.GetSourceResponse(source=sources[0])]


async def test_the_page_shows_how_sources_stand_whatever_they_are_called(browser: Browser) -> None:
    failure = Failure(reason="REPOSITORY_UNREACHABLE", message=EVIL, hint="Mend it.")
    rule = pb.SplitRule(pattern=EVIL, split=Split.SPLIT_TEST)
    hostile = pb.Source(
        name=APP, state=pb.SOURCE_STATE_FAILED, failure=failure, git=pb.GitSource(url=EVIL, ref=EVIL), exclude=[EVIL],
        split_rules=[rule], split=Split.SPLIT_TRAIN, commit=EVIL, skipped={EVIL: 3}, etag="5",
    )  # fmt: skip
    fetching = pb.Source(
        name="projects/acme/sources/lib", state=pb.SOURCE_STATE_FETCHING, file=pb.FileSource(path=EVIL)
    )
    fetching.progress.CopyFrom(Progress(done=3, total=9, unit="files", message=EVIL, eta_seconds=80, rate=2))
    script(browser, hostile, fetching)
    key = Credential(name="projects/acme/credentials/k", title=EVIL, kind=CREDENTIAL_KIND_SSH_KEY, public_key=EVIL)
    browser.services.scripts["ListCredentials"] = [ListCredentialsResponse(credentials=[key])]
    page = await browser.page(HERE)
    assert "<script>alert" not in page.html and "3 of 9 files, 2.0 files/s, 1 min 20 s left" in page.text
    assert {"source-app", "source-lib", "drop", "files", "public-key-k", "copy-k", "add-git-button"} <= set(page.ids)
    page = await browser.page(f"{HERE}/app")
    assert "<script>alert" not in page.html and EVIL in page.text
    browser.services.scripts["ListCredentials"] = [errors.PermissionDenied("too low")]
    assert "credentials-denied" in (await browser.page(HERE)).ids, "a reader sees the rest"


async def test_every_kind_of_source_is_added_as_its_form_says(browser: Browser) -> None:
    common = {
        "split": "train",
        "test_masks": "tests/\r\n*_test.py",
        "exclude": "a",
        "include": "b",
        "sync_minutes": "90",
    }
    kinds: dict[str, dict[str, str]] = {
        "git": {"url": "https://x/y.git", "ref": "main", "subpath": "s", "credential": "deploy", "submodules": "on"},
        "bundle": {"upload": "projects/acme/uploads/1", "ref": "main"},
        "archive": {"upload": "projects/acme/uploads/1", "subpath": "s"},
        "file": {"upload": "projects/acme/uploads/1", "path": "a.py"},
        "url": {"url": "https://x/y.zip", "sha256": "a" * 64},
    }
    for kind, fields in kinds.items():
        answer = await browser.send(HERE, kind=kind, source_id="app", **common, **fields)
        assert (answer.status_code, answer.headers.get("location")) == (303, HERE), answer.text
        sent = browser.asked("CreateSource")
        assert sent.parent == "projects/acme" and sent.source_id == "app" and sent.source.WhichOneof("origin") == kind
        assert [(rule.pattern, rule.split) for rule in sent.source.split_rules] == [("tests/", 2), ("*_test.py", 2)]
        assert (sent.source.split, sent.source.sync_interval_seconds) == (Split.SPLIT_TRAIN, 5400)
    assert browser.services.requests["CreateSource"][0].source.git == pb.GitSource(
        url="https://x/y.git", ref="main", subpath="s", submodules=True, credential="projects/acme/credentials/deploy"
    )
    for bad in ({"kind": "ftp"}, {"kind": "git", "split": "x"}, {"kind": "git", "sync_minutes": "soon"}):
        answer = await browser.send(HERE, **bad)
        assert answer.status_code == 400 and "problem-message" in check(answer.text).ids
    answer = await browser.send(HERE, kind="git", credential="../x")
    assert answer.status_code == 400 and browser.services.count("CreateSource") == 5


async def test_settings_are_stored_without_fetching_again_unless_the_origin_changes(browser: Browser) -> None:
    source = pb.Source(name=APP, etag="5", git=pb.GitSource(url="u", ref="r", credential="projects/acme/credentials/k"))
    script(browser, source)
    fields = {"etag": "4", "url": "u", "ref": "r", "split": "test", "exclude": "x"}
    await browser.send(f"{HERE}/app", **fields)
    sent = browser.asked("UpdateSource").source
    assert sent.WhichOneof("origin") is None and (sent.etag, list(sent.exclude)) == ("4", ["x"])
    await browser.send(f"{HERE}/app", **{**fields, "ref": "dev"})
    assert browser.asked("UpdateSource").source.git.credential == "projects/acme/credentials/k"
    assert browser.asked("UpdateSource").source.git.ref == "dev"
    browser.services.scripts["UpdateSource"] = [errors.EtagMismatch("it changed meanwhile")]
    assert (await browser.send(f"{HERE}/app", **fields)).status_code == 409
    for path, method in (("sync", "SyncSource"), ("remove", "DeleteSource")):
        assert (await browser.send(f"{HERE}/app/{path}")).status_code == 303 and browser.asked(method).name == APP
    await browser.send(f"{HERE}/app/remove", forget="on")
    assert browser.asked("ForgetSource").name == APP and browser.services.count("DeleteSource") == 1


async def test_keys_and_tokens(browser: Browser) -> None:
    way = "/console/p/acme/credentials"
    await browser.send(way, kind="ssh", credential_id="k", known_hosts="h a\nh b", pin_on_first_use="on")
    sent = browser.asked("CreateCredential")
    assert sent.secret.HasField("generate_ssh_key") and list(sent.credential.known_hosts) == ["h a", "h b"]
    answer = await browser.send(way, kind="token", token="s3cret", username="ci")
    assert browser.asked("CreateCredential").secret.https_token.token == "s3cret" and "s3cret" not in answer.text
    await browser.send(f"{way}/k/delete")
    assert browser.asked("DeleteCredential").name == "projects/acme/credentials/k"


async def test_every_change_of_a_source_arrives_as_the_part_of_the_page(browser: Browser) -> None:
    def now(name: str, state: Any) -> pb.WatchSourcesResponse:
        return pb.WatchSourcesResponse(source=pb.Source(name=f"projects/acme/sources/{name}", state=state))

    script(browser, pb.Source(name="projects/acme/sources/b"))
    fetching = [now("b", pb.SOURCE_STATE_PENDING), now("b", pb.SOURCE_STATE_FETCHING)]
    gone = pb.WatchSourcesResponse(removed="projects/acme/sources/b")
    somebodys = now("a", pb.SOURCE_STATE_READY)
    browser.services.scripts["WatchSources"] = [[
        now("b", pb.SOURCE_STATE_FAILED), later(fetching[0], browser, 1), fetching[1],
        later(somebodys, browser, 2), later(gone, browser, 3),
    ]]  # fmt: skip
    events = await browser.listen(f"{HERE}/-/live")
    assert [kind for kind, _, _ in events] == ["part", "part", "part", "part", "end"]
    parts = [Page(html) for _, html, _ in events[:4]]
    assert [part.elements[0][1]["id"] for part in parts] == ["source-list", "source-b", "source-list", "source-list"]
    assert "failed" in parts[0].text, "the whole list at first: others may have added some since the page was made"
    assert "fetching" in parts[1].text and "pending" not in parts[1].text, "only the newest of what comes at once"
    assert {"source-a", "source-b-state"} <= set(parts[2].ids) and parts[2].ids.index("source-a") == 2, "by name"
    assert "source-a" in parts[3].ids and "source-b" not in parts[3].ids
    browser.services.scripts["WatchSources"] = [errors.KeyRevoked("the key was revoked")]
    assert (await browser.listen(f"{HERE}/-/live"))[-1][:2] == ("failed", "the key was revoked")


async def test_a_file_is_sent_on_from_where_it_stopped_in_messages_that_ingest_takes(browser: Browser) -> None:
    content = bytes(range(256)) * 10_000
    sha256, offset = hashlib.sha256(content).hexdigest(), 100_000
    there = Upload(name=f"projects/acme/uploads/{sha256}", sha256=sha256, offset=offset)
    whole = Upload(name=there.name, complete=True, offset=len(content))
    arrived: list[Any] = []

    async def receive(messages: AsyncIterator[Any]) -> UploadContentResponse:
        arrived.extend([message async for message in messages])
        return UploadContentResponse(upload=whole)

    browser.services.scripts |= {"GetUpload": [GetUploadResponse(upload=there)], "UploadContent": [receive]}
    way = f"/console/p/acme/uploads/{sha256}"
    state = (await browser.http.get(way)).json()
    assert state == {"name": there.name, "offset": offset, "complete": False}
    await browser.page("/console")
    headers = {"content-type": "application/octet-stream", "x-csrf-token": browser.csrf, "accept": "application/json"}
    query = {"offset": str(offset), "size": str(len(content)), "filename": "a.zip"}
    answer = await browser.http.put(way, params=query, content=content[offset:], headers=headers)
    assert answer.json() == {"name": there.name, "offset": len(content), "complete": True}
    header, chunks = arrived[0].header, [each.chunk for each in arrived[1:]]
    assert (header.parent, header.size, header.filename) == ("projects/acme", len(content), "a.zip")
    assert (
        b"".join(each.data for each in chunks) == content[offset:] and max(len(each.data) for each in chunks) <= 1 << 20
    )
    assert [each.offset for each in chunks[:2]] == [offset, offset + (1 << 20)]
    for wrong, status in (({"content-type": "text/plain"}, 400), ({"x-csrf-token": "x"}, 403)):
        assert (
            await browser.http.put(way, params=query, content=b"x", headers={**headers, **wrong})
        ).status_code == status
    for query in ({}, {"offset": "0"}, {"offset": "-1", "size": "5"}, {"offset": "0", "size": "x"}):
        assert (await browser.http.put(way, params=query, content=b"x", headers=headers)).status_code == 400


async def test_what_arrived_of_a_broken_upload_is_kept(browser: Browser) -> None:
    arrived, ended = bytearray(), asyncio.Event()

    async def receive(messages: AsyncIterator[Any]) -> UploadContentResponse:
        async for message in messages:
            arrived.extend(message.chunk.data)
        ended.set()
        raise errors.UploadMismatch("2 of 9 bytes have arrived", field="header.size")

    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * (3 << 20)
        async with asyncio.timeout(20):
            while len(arrived) < 3 << 20:  # noqa: ASYNC110  # what is still on its way breaks with the connection
                await asyncio.sleep(0.01)
        raise RuntimeError("the cable")

    browser.services.scripts["UploadContent"] = [receive]
    await browser.page("/console")
    headers = {"content-type": "application/octet-stream", "x-csrf-token": browser.csrf}
    way = f"/console/p/acme/uploads/{'a' * 64}?offset=0&size={9 << 20}"
    with contextlib.suppress(RuntimeError):
        await browser.http.put(way, content=breaking(), headers=headers)
    await asyncio.wait_for(ended.wait(), 20)
    assert len(arrived) == 3 << 20, "the call ended as one whose bytes are kept, not as one that was cancelled"


async def test_a_refused_upload_says_why_while_the_browser_still_sends(browser: Browser) -> None:
    browser.services.scripts["UploadContent"] = [errors.LimitExceeded("too large", field="header.size")]
    await browser.page("/console")
    headers = {"content-type": "application/octet-stream", "x-csrf-token": browser.csrf, "accept": "application/json"}
    answer = await browser.http.put(
        f"/console/p/acme/uploads/{'a' * 64}?offset=0&size=9", content=b"x" * 9, headers=headers
    )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "LIMIT_EXCEEDED"
