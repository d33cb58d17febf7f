"""A person at the console: a window of Debian's Chromium, and an eye on everything that must not happen in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import axe_playwright_python
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE, NARROW, HEIGHT = 1280, 390, 844
_AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
_WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
_RUN_AXE = f"axe.run(document, {{resultTypes: ['violations'], runOnly: {_WCAG}}})"
_SECONDS = 60


@dataclass
class Desk:
    """One window. What goes wrong in it stays in ``troubles``: tests ask for it."""

    page: Page
    url: str
    troubles: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> Page:
        """Has an eye on one more tab."""
        page.set_default_timeout(1000 * _SECONDS)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.troubles.append(f"{page.url}: {error}"))
        page.on("request", self._asked)
        return page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.troubles.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _asked(self, request: Request) -> None:
        if urlsplit(request.url)[:2] != urlsplit(self.url)[:2]:
            self.troubles.append(f"a request to {request.url}")

    @contextmanager
    def expecting(self, words: str) -> Iterator[None]:
        """For what a browser says of its own when an answer is an error: everything within that has these words."""
        before = len(self.troubles)
        yield
        during = self.troubles[before:]
        assert any(words in each for each in during), f"nothing was said of {words!r}: {during}"
        self.troubles[before:] = [each for each in during if words not in each]

    def click(self, id: str) -> None:
        """Clicks the element with this id."""
        self.page.locator(f"#{id}").click()

    def fill(self, **fields: str) -> None:
        """Types into the fields with these ids, whose hyphens are written as two underscores."""
        for id, value in fields.items():
            self.page.locator(f"#{id.replace('__', '-')}").fill(value)

    def at(self, id: str) -> Locator:
        """The element with this id."""
        return self.page.locator(f"#{id}")

    def look(self, name: str) -> None:
        """Takes pictures of the page, wide and light, then narrow and dark, and has both checked by axe.

        Raises:
            AssertionError: a violation of WCAG 2.2 A or AA, or a page that is wider than its window.
        """
        page, found = self.page, []
        devtools = page.context.new_cdp_session(page)
        devtools.send("Runtime.evaluate", {"expression": _AXE})  # not bound by the page's Content-Security-Policy
        for scheme, width in (("dark", NARROW), ("light", WIDE)):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.set_viewport_size({"width": width, "height": HEIGHT})
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
            found += [f"{width}, {scheme}: {each}" for each in _violations(devtools)]
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if wider > 0:
                found.append(f"{width}: the page is {wider} pixels wider than the window")
        devtools.detach()
        assert found == [], f"{name}: " + "\n".join(found)

    def drop(self, path: Path, target: str) -> None:
        """Drags a file from outside of the browser onto an element, as the window system does."""
        element = self.page.locator(f"#{target}")
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        assert box
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        devtools = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            devtools.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})
        devtools.detach()


def _violations(devtools: Any) -> list[str]:
    answer = devtools.send("Runtime.evaluate", {"expression": _RUN_AXE, "awaitPromise": True, "returnByValue": True})
    assert "exceptionDetails" not in answer, answer
    return [
        f"{each['id']} ({each['help']}): {[node['html'][:160] for node in each['nodes']]}"
        for each in answer["result"]["value"]["violations"]
    ]


@contextmanager
def window(url: str) -> Iterator[Desk]:
    """A new browser, without anything of an earlier one."""
    chromium = shutil.which("chromium")
    assert chromium, "these tests need Debian's Chromium: apt-get install chromium (make test does it for root)"
    SHOTS.mkdir(parents=True, exist_ok=True)
    # The browser's own sandbox cannot be had as root, nor in most containers.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=1000 * _SECONDS)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium, args=arguments) as it:
        size = {"width": WIDE, "height": HEIGHT}
        # Without motion, or axe would see colours on their way from light to dark.
        with it.new_context(
            viewport=size, reduced_motion="reduce", permissions=["clipboard-read", "clipboard-write"]
        ) as context:
            yield in_tab(context, url)


def in_tab(context: BrowserContext, url: str) -> Desk:
    """A tab of its own."""
    made = Desk(context.new_page(), url)
    made.watch(made.page)
    return made
