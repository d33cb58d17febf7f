"""docs/api: what is there is what the contract, the policy and the error table say, all of it."""

from __future__ import annotations

import re

from services.core import errors
from services.core.auth import policy
from tests.rpcs import METHODS
from tools import api_reference, contract

PAGES = api_reference.pages()


def test_the_pages_are_up_to_date() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in api_reference.FOLDER.glob("*.md")}
    assert there.keys() == PAGES.keys()
    old = [name for name, page in PAGES.items() if there[name] != page]
    assert not old, f"the contract has changed: make docs ({', '.join(old)})"


def test_every_rpc_is_told_with_its_role_and_its_errors() -> None:
    told = {}
    for page in PAGES.values():
        for part in page.split("\n### ")[1:]:
            if found := re.search(r"^`(/codegraft\.\S+)`: ", part, re.M):
                told[found[1]] = part
    assert told.keys() == {method for method in METHODS if method.startswith("/codegraft.")}
    for method, part in told.items():
        rule = policy.rule_of(method)
        assert rule is not None and rule.role is not None
        assert f"- Role: {rule.role.name.lower()}, in " in part, method
        assert all(f"`{field.removeprefix('projects/{').removesuffix('}')}`" in part for field in rule.fields), method
        assert ("audit log" in part) is policy.changes(method)
        assert re.search(r"^- Errors: (\[[A-Z_]+\]\(README\.md#[a-z_]+\)[,.] ?)+$", part, re.M), method
        assert "\nErrors: " not in part


def test_every_field_is_told_with_its_comment() -> None:
    everything = "\n".join(PAGES.values())
    for message in contract.messages().values():
        last = message.name.rpartition(".")[2]
        assert f"### {last}\n" in everything or f"**{last}**" in everything
        rows = set(everything.splitlines())
        for field in message.fields:
            ours = [row for row in rows if row.startswith(f"| `{field.name}` | ") and f" | {field.number} | " in row]
            assert ours or (message.is_enum and f"| `{field.name}` | {field.number} | " in everything), field.name
    settings = PAGES["scanner.md"]
    assert "| `max_loss` | optional double | 7 | Largest accepted loss in nats per token; default 3.0. |" in settings
    assert "| `reasons` | map of string to [ScanCount](#scancount) | 4 | " in settings
    assert "| `split` | [Split](common.md#split) | 14 | " in settings
    assert "| `git` | [GitSource](#gitsource) in `origin` | 3 | " in PAGES["ingest.md"]
    assert "| `origin` | one of: |  | What it is. Exactly one must be set" in PAGES["ingest.md"]


def test_the_errors_are_those_of_the_table() -> None:
    told = set(re.findall(r'^\| <a id="[a-z_]+"></a>([A-Z_]+) \| [A-Z_]+ \| .+ \|$', PAGES["README.md"], re.M))
    assert told == {error.reason for error in errors.all_errors()}


def test_what_markdown_would_read_as_something_else_is_escaped() -> None:
    """A pattern such as GPL-* is no emphasis, and store:<name> no element."""
    assert 'SPDX id; a trailing \\* stands for the rest ("GPL-\\*")' in PAGES["scanner.md"]
    assert 'its id will be "store:\\<name>"' in PAGES["trainer.md"]
    assert "QUEUED -> RUNNING -> SUCCEEDED | FAILED" in PAGES["common.md"]
    for name, page in PAGES.items():
        for line in page.splitlines():
            cells = re.split(r"(?<!\\)\|", line)
            if line.startswith("| ") and name != "README.md":
                assert len(cells) == 5 + ("| field |" in line or len(cells) == 6), line
