"""The operating guide, the runbooks and the READMEs of deploy/: what they tell to type exists, and so do the settings,
the reasons and the lines of log that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from services.cli.main import app
from services.core import errors
from services.core.config import CoreSettings
from tests.unit.deploy.chart import CHART, ROOT
from tests.unit.deploy.test_settings import CLASSES

RUNBOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))
DOCUMENTS = [
    ROOT / "docs/operations.md",
    *RUNBOOKS,
    ROOT / "README.md",
    *(ROOT / f"docs/{name}.md" for name in ("adding-a-base-model", "architecture", "console", "events", "scale")),
    *(ROOT / f"docs/{name}.md" for name in ("security", "telemetry")),
    ROOT / "deploy/README.md",
    ROOT / "deploy/telemetry/README.md",
    ROOT / "deploy/images/README.md",
    CHART / "README.md",
]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands(document: Path) -> Iterator[list[str]]:
    """The arguments of every `codegraft …`, in blocks and in running text. A resource is what the reader puts in."""
    text = document.read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"^\s*(?:time )?codegraft (.+?)(?:\s+#.*)?$", blocks, re.MULTILINE)
    found += re.findall(r"`codegraft ([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in found:
        yield shlex.split(line.replace("…", "acme"))


@cache
def whole_command() -> TyperGroup:
    """All of `codegraft`; making it takes a moment."""
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


def problem(arguments: list[str]) -> str:
    """What is wrong with a command; empty when the command and all of its options exist."""
    command: Any = whole_command()
    rest = list(arguments)
    while isinstance(command, TyperGroup):
        if not rest:
            return ""  # a group is named, not run
        found = command.commands.get(rest[0])
        if found is None:
            return f"no command {rest[0]!r}"
        command = found
        rest.pop(0)
    options = {"--help"} | {
        name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("-")
    }
    unknown = [one for one in rest if one.startswith("-") and one.partition("=")[0] not in options]
    return f"{command.name} has no {', '.join(unknown)}" if unknown else ""


@every_document
def test_commands_and_their_options_exist(document: Path) -> None:
    wrong = {" ".join(arguments): problem(arguments) for arguments in commands(document) if problem(arguments)}
    assert not wrong


def options(command: Any) -> set[str]:
    """Of a command and all below it."""
    own = {name for one in command.params for name in one.opts}
    return own.union(*(options(one) for one in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("document", [*RUNBOOKS, ROOT / "docs/operations.md"], ids=lambda path: path.stem)
def test_options_that_stand_alone_exist(document: Path) -> None:
    told = set(re.findall(r"`(--[a-z-]+)[^`]*`", document.read_text()))
    assert told <= options(whole_command())


def test_a_command_that_does_not_exist_is_found() -> None:
    assert problem(["train", "strat"]) and problem(["train", "start", "--projekt", "x"])
    assert not problem(["train", "start", "--project", "x"]) and not problem(["serve"])
    assert sum(len(list(commands(document))) for document in DOCUMENTS) > 50


@every_document
def test_settings_and_reasons_exist(document: Path) -> None:
    text = document.read_text()
    fields = {field for settings in CLASSES.values() for field in settings.model_fields}
    names = {one.lower() for one in re.findall(r"CODEGRAFT_([A-Z][A-Z_]+[A-Z])\b", text)} - {"config"}
    names |= set(re.findall(r"`((?:ingest|scanner|trainer|inference)_[a-z_]+)`", text))
    assert names <= fields, names - fields
    reasons = {one.reason for one in vars(errors).values() if isinstance(one, type) and hasattr(one, "reason")}
    named = set(re.findall(r"`(?!CODEGRAFT_|OTEL_)([A-Z]+(?:_[A-Z]+)+)`", text)) - {"HF_TOKEN", "JOBS_DEAD"}
    assert named <= reasons, named - reasons


@cache
def source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))


@pytest.mark.parametrize("runbook", RUNBOOKS, ids=lambda path: path.stem)
def test_lines_of_log_exist(runbook: Path) -> None:
    """Those in the first column of a table under "in the … logs" or "the message says", and in greps."""
    text = runbook.read_text()
    told: set[str] = set()
    for table in re.findall(
        r"^\| (?:in the [a-z' ]*logs[a-z ]*|the message says) .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M
    ):
        for row in table.splitlines():
            told |= set(re.findall(r"`([a-z][^`]*)`", row.split("|")[1], re.I))
    for pattern in re.findall(r"grep -E '([^'\"(]+)'", text):
        told |= set(pattern.split("|"))
    told -= {"field", "hint", "serving", "…_WORKERS=0", "S3"}
    missing = {one for one in told if one not in source()}
    assert not missing


def test_every_runbook_is_listed_and_has_its_four_parts() -> None:
    listed = set(re.findall(r"\]\(([a-z-]+\.md)\)", (ROOT / "docs/runbooks/README.md").read_text()))
    pages = {path.name: path for path in RUNBOOKS if path.name != "README.md"}
    assert listed == set(pages) and len(pages) == 10
    for page in pages.values():
        text = page.read_text()
        parts = ["**Symptom.**", "**What it means.**", "\n## Look\n", "\n## Mend\n", "**Done when**"]
        assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts), page.name


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_core_settings_are_the_common_ones() -> None:
    assert set(CoreSettings.model_fields) <= set(CLASSES["ingest"].model_fields)
