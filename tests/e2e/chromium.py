"""A person at the console: a window of Debian's Chromium, and an eye on everything that must not happen in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import axe_playwright_python
from playwright.sync_api import BrowserContext, ConsoleMessage, Error, Locator, Page, Request, expect, sync_playwright

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE, NARROW, HEIGHT = 1280, 390, 844
_AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
_WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
_RUN_AXE = f"axe.run(document, {{resultTypes: ['violations'], runOnly: {_WCAG}}})"
_SECONDS = 60
Scheme = Literal["light", "dark"]


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
        for _ in range(20 * _SECONDS):  # it may say so after the page has shown the error
            if any(words in each for each in self.troubles[before:]):
                break
            self.page.wait_for_timeout(50)
        during = self.troubles[before:]
        assert any(words in each for each in during), f"nothing was said of {words!r}: {during}"
        self.troubles[before:] = [each for each in during if words not in each]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For what has a page loaded, this one anew or another: returns once that is there.

        What is checked before may be the old page's, and what is typed into that is lost.
        """
        # By a locator, which waits for the element: between two pages there is none.
        self.page.locator("html").evaluate("html => { html.dataset.old = ''; }")
        yield
        expect(self.page.locator("html:not([data-old])")).to_be_attached()
        self.page.wait_for_load_state()

    def click(self, id: str) -> None:
        """Clicks the element with this id; on a page that is still being loaded its script would not hear of it."""
        found = self.at(id)
        found.wait_for()
        self.page.wait_for_load_state()
        found.click()

    def fill(self, **fields: str) -> None:
        """Types into the fields with these ids, whose hyphens are written as two underscores."""
        for id, value in fields.items():
            self.page.locator(f"#{id.replace('__', '-')}").fill(value)

    def at(self, id: str) -> Locator:
        """The element with this id."""
        return self.page.locator(f"#{id}")

    def look(self, name: str, *, crossed: bool = False) -> None:
        """Takes pictures of the page, narrow and dark, then wide and light, and has both checked by axe.

        Args:
            crossed: narrow and light, and wide and dark, as well: for the pages with the most in them.

        Raises:
            AssertionError: a violation of WCAG 2.2 A or AA, or a page that is wider than its window.
        """
        views: list[tuple[Scheme, int]] = [("dark", NARROW), ("light", WIDE)]
        views = [("light", NARROW), ("dark", WIDE), *views] if crossed else views
        for _ in range(3):
            self.page.evaluate("document.documentElement.dataset.looked = ''")
            try:
                found = self._faults(name, views)
                break
            except (Error, AssertionError):
                if self.page.locator("html[data-looked]").count():
                    raise
                self.page.wait_for_load_state()  # it has loaded itself anew, as a run's does at its end
        else:
            raise AssertionError(f"{name} loads itself anew again and again")
        assert found == [], f"{name}: " + "\n".join(found)

    def _faults(self, name: str, views: Sequence[tuple[Scheme, int]]) -> list[str]:
        page, found = self.page, list[str]()
        devtools = page.context.new_cdp_session(page)
        devtools.send("Runtime.evaluate", {"expression": _AXE})  # not bound by the page's Content-Security-Policy
        for scheme, width in views:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": HEIGHT})
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
            found += [f"{width}, {scheme}: {each}" for each in _violations(devtools)]
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if wider > 0:
                found.append(f"{width}, {scheme}: the page is {wider} pixels wider than the window")
        devtools.detach()
        return found

    def drop(self, path: Path, target: str) -> None:
        """Drags a file from outside of the browser onto an element, as the window system does."""
        self.page.wait_for_load_state()
        element = self.at(target)
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
