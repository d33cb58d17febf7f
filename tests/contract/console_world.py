"""What tests know of a console. Its fixtures are in console_fixtures.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import httpx2

from tests.unit.client.conftest import Fake

Event = tuple[str, str, str]
"""Kind, data and id of one of a page's live events."""
KEY = "cg_ops_0123456789abcdef"
EVIL = "<script>alert(1)</script>\"'&{{7*7}}"
"""A name that does harm wherever it is not escaped."""
_BLOCKS = frozenset(
    ["div", "form", "p", "ul", "ol", "dl", "table", "section", "pre", "fieldset", "details", "h2", "h3"]
)
_VOID = frozenset(["meta", "link", "input", "br", "hr", "img"])


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, and whether they are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        assert "p" not in self.open or tag not in _BLOCKS, f"<{tag}> ends a paragraph in the middle"
        assert not (tag in self.open and tag in ("form", "a", "button")), f"<{tag}> within another"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "line", "circle", "text", "g", "svg") or self.open[-1:] == [tag]:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check(html: str) -> Page:
    """The page, once it is known to be well-formed, without inline code, and fit for a keyboard and a screen reader."""
    page = Page(html)
    assert page.open == [], page.open
    assert len(page.ids) == len(set(page.ids)), sorted(each for each in page.ids if page.ids.count(each) > 1)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert "data-fresh" not in attributes or attributes.get("id"), "a part that is loaded anew is found by its id"
        assert tag != "style" and (tag != "script" or set(attributes) == {"type", "src"})
        for name in ("href", "src", "action"):
            assert not re.match(r"(?i)\s*(javascript|data|https?|//)", attributes.get(name, "")), attributes
    labelled = {attributes.get("for") for attributes in page.of("label")}
    for tag in ("input", "select", "textarea"):
        for attributes in page.of(tag):
            if attributes.get("type") != "hidden":
                assert attributes.get("id") in labelled or "aria-label" in attributes, attributes
    for attributes in page.of("a"):
        target = attributes["href"]
        assert not target.startswith("#") or target[1:] in page.ids, target
    assert len(page.of("h1")) == 1 and len(page.of("main")) == 1 and page.of("title")
    return page


@dataclass
class Browser:
    """A browser with its cookies, in front of a gateway."""

    http: httpx2.AsyncClient
    services: Fake
    keys: list[str]
    """What each call to a service came with."""
    leave: Callable[[], None] = field(default=lambda: None)
    """Tells the gateway to stop."""
    csrf: str = field(default="")
    heard: list[Event] = field(default_factory=list)
    """What :meth:`listen` has got so far."""

    async def page(self, way: str, status: int = 200) -> Page:
        """A page, which must be sound; its forms' token is kept."""
        answer = await self.http.get(way)
        assert answer.status_code == status, (answer.status_code, answer.headers.get("location"), answer.text[-900:])
        found = check(answer.text)
        self.csrf = next(each["content"] for each in found.of("meta") if each.get("name") == "csrf")
        return found

    async def sign_in(self, key: str, way: str = "/console", **headers: str) -> httpx2.Response:
        await self.page("/console/login")
        answer = await self.http.post(
            "/console/login", data={"csrf": self.csrf, "key": key, "next": way}, headers=headers
        )
        if answer.status_code == 303:
            self.csrf = ""
        return answer

    async def send(self, way: str, **fields: Any) -> httpx2.Response:
        """A form of a page that was loaded."""
        if not self.csrf:
            await self.page("/console")
        return await self.http.post(way, data={"csrf": self.csrf, **fields})

    async def listen(self, way: str, last: str = "", until: str | Callable[[str], bool] = "\0") -> list[Event]:
        """A stream's events, to its end, or to one whose data hold these words or are those that it waits for."""
        headers = {"accept": "text/event-stream", **({"last-event-id": last} if last else {})}
        found = self.heard = []
        async with self.http.stream("GET", way, headers=headers) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            async for event in _events(answer.aiter_lines()):
                found.append(event)
                is_last = until in event[1] if isinstance(until, str) else until(event[1])
                if event[0] in ("end", "failed") or is_last:
                    break
        return found

    def asked(self, method: str) -> Any:
        """The last request that a service got."""
        return self.services.requests[method][-1]


def later(message: Any, browser: Browser, count: int) -> Callable[[object], Awaitable[Any]]:
    """A step of a scripted stream: what comes once the browser has got so many events of what came before."""

    async def step(request: object) -> Any:
        async with asyncio.timeout(20):
            while len(browser.heard) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return message

    return step


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    kind, data, position = "", [], ""
    async for line in lines:
        name, _, value = line.partition(": ")
        if not line and kind:
            yield kind, "\n".join(data), position
            kind, data = "", []
        elif name == "event":
            kind = value
        elif name.rstrip(":") == "data":
            data.append(value)
        elif name == "id":
            position = value
