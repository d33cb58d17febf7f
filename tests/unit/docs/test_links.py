"""Links within the documentation lead to files and headings that are there, and every page is listed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tools.contract import ROOT

PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
)  # fmt: skip


def prose(page: Path) -> str:
    """Without blocks and spans of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return re.sub(r"`[^`\n]*`", "code", text)


@cache
def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page: its headings' words with hyphens between, numbered when repeated."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found: set[str] = set(re.findall(r'<a id="([^"]+)"></a>', text))
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path, target: str) -> str:
    """What is wrong with a link; empty when it leads somewhere, or out of here."""
    if re.match(r"[a-z]+:", target):
        return ""
    path, _, fragment = target.partition("#")
    to = (page.parent / path).resolve() if path else page
    if not to.exists():
        return f"{target}: no such file"
    if not to.is_relative_to(ROOT):
        return f"{target}: leads out of the repository"
    return f"{target}: no such heading" if fragment and fragment not in anchors(to) else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = [problem for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if (problem := broken(page, target))]
    assert not wrong


def test_headings_that_are_linked_to_are_there_once() -> None:
    """A second one of the same name would be what GitHub does not link to."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        assert not [anchor for anchor in anchors(page) if re.search(r"-\d+$", anchor)], page.name


def test_a_link_that_leads_nowhere_is_found() -> None:
    readme = ROOT / "README.md"
    assert (
        broken(readme, "docs/nowhere.md") and broken(readme, "docs/security.md#nowhere") and broken(readme, "../x.md")
    )
    assert not broken(readme, "docs/security.md#who-calls") and not broken(readme, "https://example.com/x#y")
    assert sum(len(re.findall(r"\]\(", prose(page))) for page in PAGES) > 500


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", index)}
    assert set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "README.md"} <= listed
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
