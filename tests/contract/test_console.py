"""The console's front door: who gets in, what the browser keeps, what a foreign page can do, what errors look like."""

from __future__ import annotations

import time

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response

from codegraft.access.v1 import quota_pb2
from codegraft.ingest.v1.project_pb2 import (
    CreateProjectRequest,
    CreateProjectResponse,
    GetProjectResponse,
    ListProjectsResponse,
    Project,
)
from services.core import errors
from services.gateway.console.session import COOKIE, Session, Vault
from tests.contract.console_world import EVIL, KEY, Browser, check

pytest_plugins = ["tests.contract.console_fixtures"]


def cookie(answer: httpx2.Response) -> str:
    return next(each for each in answer.headers.get_list("set-cookie") if each.startswith(f"{COOKIE}="))


async def test_without_a_session_every_page_leads_to_the_login_and_back(stranger: Browser) -> None:
    assert (await stranger.http.get("/")).headers["location"] == "/console"
    for way in ("/console", "/console/p/acme/sources", "/console/p/acme/sources?a=1"):
        answer = await stranger.http.get(way)
        assert answer.status_code == 303 and not stranger.services.requests
        login = await stranger.page(answer.headers["location"])
        assert {"name": "next", "value": way, "type": "hidden"} in login.of("input")
    answer = await stranger.http.get("/console/p/acme/sources/-/live", headers={"accept": "text/event-stream"})
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "UNAUTHENTICATED"
    assert (await stranger.http.post("/console/projects", data={"project_id": "x"})).status_code == 401
    assert not stranger.services.requests


async def test_the_key_goes_into_a_cookie_that_no_script_and_no_other_site_gets(stranger: Browser) -> None:
    answer = await stranger.sign_in(KEY, "/console/p/acme/sources")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/p/acme/sources")
    kept = cookie(answer)
    assert "HttpOnly" in kept and "SameSite=strict" in kept and "Path=/console" in kept and "Secure" not in kept
    assert "Max-Age" not in kept and KEY not in kept, "it ends with the browser, and does not show the key"
    await stranger.page("/console")
    assert set(stranger.keys) == {f"Bearer {KEY}"}
    for over_https in (
        {"x-forwarded-proto": "https"},
        {"origin": str(stranger.http.base_url).replace("http", "https")},
    ):
        assert "; Secure" in cookie(await stranger.sign_in(KEY, **over_https)), over_https


async def test_a_key_that_no_service_knows_is_refused_in_place(stranger: Browser) -> None:
    stranger.services.scripts["GetCaller"] = [errors.Unauthenticated("no such key", hint="Ask your admin.")]
    answer = await stranger.sign_in(KEY)
    told = check(answer.text).text
    assert answer.status_code == 401 and "No such key" in told, "the hint of a service is for programs"
    assert "Ask your admin" not in told
    assert (await stranger.http.get("/console")).status_code == 303
    for key in ("", "two words", "ä", "x" * 2401):
        assert (await stranger.sign_in(key)).status_code == 400
    assert stranger.services.count("GetCaller") == 1


async def test_who_comes_by_a_link_from_elsewhere_stays_signed_in(browser: Browser) -> None:
    session = browser.http.cookies[COOKIE]
    browser.http.cookies.clear()  # as browsers do with a strict cookie then
    login = await browser.page((await browser.http.get("/console/p/acme/sources")).headers["location"])
    assert [each["href"] for each in login.of("a") if each.get("id") == "go-on"] == ["/console/p/acme/sources"]
    assert COOKIE not in browser.http.cookies, "the session's is not touched"
    browser.http.cookies.set(COOKIE, session, path="/console")
    assert (await browser.http.get("/console")).status_code == 200


async def test_signing_in_leads_nowhere_else(stranger: Browser) -> None:
    for way in ("https://evil.example", "//evil.example", "/consoleevil", "/console/../x\\", "/v1"):
        assert (await stranger.sign_in(KEY, way)).headers["location"] == "/console", way


async def test_forms_of_other_pages_are_refused(browser: Browser) -> None:
    await browser.page("/console")
    own, browser.csrf = browser.csrf, "guessed"
    for fields in ({}, {"csrf": ""}, {"csrf": "guessed"}, {"csrf": own + "x"}, {"csrf": "ä"}):
        answer = await browser.http.post("/console/projects", data={"project_id": "p", **fields})
        assert answer.status_code == 403 and "FORGED_FORM" in check(answer.text).text
    answer = await browser.http.post(
        "/console/projects", data={"csrf": own, "project_id": "p"}, headers={"origin": "https://evil.example"}
    )
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "FOREIGN_ORIGIN"
    plain = {"content-type": "text/plain", "x-csrf-token": "guessed"}
    assert (await browser.http.post("/console/projects", content=b"csrf=x", headers=plain)).status_code == 403
    assert "CreateProject" not in browser.services.requests
    stolen = {"csrf": own, "key": KEY}
    browser.http.cookies.clear()
    assert (await browser.http.post("/console/login", data=stolen)).status_code == 403, "a token of another session"


async def test_a_session_ends_by_signing_out_and_by_time(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = browser.http.cookies[COOKIE]
    assert (await browser.send("/console/logout")).headers["location"] == "/console/login"
    assert COOKIE not in browser.http.cookies and (await browser.http.get("/console")).status_code == 303
    request = Request({"type": "http", "headers": [(b"cookie", f"{COOKIE}={kept}".encode())]})
    assert Vault("").read(request) is None, "without a setting each gateway seals with a key of its own"
    late = time.time() + 12 * 3600 + 60
    for bad in (kept[:-4] + "AAAA", "", "x", kept):
        browser.http.cookies.clear()
        browser.http.cookies.set(COOKIE, bad, path="/console")
        if bad == kept:  # nothing is kept here that could end it, but time
            monkeypatch.setattr(time, "time", lambda: late)
        assert (await browser.http.get("/console")).status_code == 303, bad


def test_replicas_with_the_same_setting_open_each_others_cookies() -> None:
    one, two, response = Vault("k" * 32), Vault("k" * 32), Response()
    one.write(response, Session(KEY), secure=True)
    sealed = response.headers["set-cookie"].partition(";")[0]
    found = two.read(Request({"type": "http", "headers": [(b"cookie", sealed.encode())]}))
    assert found is not None and found.key == KEY and not found.owns(Session(KEY).csrf)


async def test_headers_let_nothing_in_from_elsewhere(browser: Browser) -> None:
    answer = await browser.http.get("/console")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY" and answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "same-origin"
    script = await browser.http.get("/console/static/console.js")
    assert script.headers["content-type"].startswith("text/javascript")
    again = await browser.http.get("/console/static/console.js", headers={"if-none-match": script.headers["etag"]})
    assert again.status_code == 304
    for name in ("nothing.js", "..%2Fsession.py", "../session.py"):
        assert (await browser.http.get(f"/console/static/{name}")).status_code == 404


async def test_a_project_of_others_is_denied_and_says_so(browser: Browser) -> None:
    denied = errors.PermissionDenied("keys/ops may not do this in projects/theirs", hint="Ask for a key of it.")
    for method in ("GetProject", "ListSources", "WatchSource"):
        browser.services.scripts[method] = [denied]
    for way in ("", "/sources"):
        page = await browser.page(f"/console/p/theirs{way}", 403)
        assert "Not allowed" in page.text and denied.message in page.text and denied.hint in page.text
    answer = await browser.send("/console/p/theirs/settings", title="x")
    assert answer.status_code == 403 and denied.message in check(answer.text).text
    as_script = {"accept": "application/json", "x-csrf-token": browser.csrf}
    said = (await browser.http.post("/console/p/theirs/settings", data={"a": "b"}, headers=as_script)).json()
    assert said["error"]["code"] == "PERMISSION_DENIED"


async def test_a_key_that_ended_leads_to_the_login(browser: Browser) -> None:
    browser.services.scripts["ListProjects"] = [errors.KeyRevoked("the key was revoked")]
    answer = await browser.http.get("/console")
    assert answer.status_code == 303 and answer.headers["location"].startswith("/console/login")
    assert COOKIE not in browser.http.cookies


async def test_names_do_no_harm(browser: Browser) -> None:
    project = Project(name="projects/acme", title=EVIL, exclude=[EVIL], etag="4")
    browser.services.scripts["ListProjects"] = [ListProjectsResponse(projects=[project])]
    browser.services.scripts["GetProject"] = [GetProjectResponse(project=project)]
    for way in ("/console", "/console/p/acme"):
        page = await browser.page(way)
        assert "<script>alert" not in page.html and "49" not in page.html.replace(browser.csrf, "")
        assert EVIL in page.text or EVIL in [each.get("value") for each in page.of("input")]
    page = await browser.page("/console/p/%3Cscript%3Ealert(1)", 400)
    assert "<script>alert" not in page.html


async def test_a_project_shows_what_it_may_use_and_uses(browser: Browser) -> None:
    browser.services.scripts |= {
        "GetProject": [GetProjectResponse(project=Project(name="projects/acme"))],
        "GetQuota": [quota_pb2.GetQuotaResponse(effective=quota_pb2.Limits(storage_bytes=4096, runs=0, scans=2))],
        "GetUsage": [
            quota_pb2.GetUsageResponse(
                used=quota_pb2.Limits(storage_bytes=3072, scans=1, tokens_per_minute=1234),
                storage=quota_pb2.StorageUsage(sources=1024, training_states=2048),
            )
        ],
    }
    page = await browser.page("/console/p/acme")
    for told in (
        "storage 3.0 KiB 4.0 KiB sources 1.0 KiB, training states 2.0 KiB",
        "tokens a minute 1,234 no limit",
        "scans at once 1 2",
        "runs at once \u2013 0",
    ):
        assert told in page.text
    assert [bar["value"] for bar in page.of("progress")] == ["0.75", "0.5"]
    browser.services.scripts["GetUsage"] = [errors.PermissionDenied("of others")]
    assert "not to be had" in (await browser.page("/console/p/acme")).text


async def test_a_project_is_made_and_changed_as_its_form_says(browser: Browser) -> None:
    browser.services.scripts["CreateProject"] = [_created]
    answer = await browser.send("/console/projects", project_id="acme", title="Acme")
    assert answer.headers["location"] == "/console/p/acme/sources"
    stored = Project(name="projects/acme", etag="7", languages_off=["SQL"])
    browser.services.scripts["GetProject"] = [GetProjectResponse(project=stored)]
    await browser.send(
        "/console/p/acme/settings", etag="6", title="T", exclude="a/\r\n\r\n b ", exclude_licenses="GPL-*"
    )
    sent = browser.asked("UpdateProject").project
    assert (sent.etag, sent.title, list(sent.exclude), list(sent.languages_off)) == ("6", "T", ["a/", "b"], ["SQL"])
    browser.services.scripts["DeleteProject"] = [errors.ProjectNotEmpty("it has sources")]
    answer = await browser.send("/console/p/acme/delete", etag="7")
    assert answer.status_code == 400 and "it has sources" in check(answer.text).text
    assert not browser.asked("DeleteProject").force


def _created(request: CreateProjectRequest) -> CreateProjectResponse:
    return CreateProjectResponse(project=Project(name=f"projects/{request.project_id}"))
