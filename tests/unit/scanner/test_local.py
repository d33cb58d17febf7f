"""Stage 1 over a folder of this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from services.cli.main import main
from services.core.errors import InvalidArgument
from services.scanner import local
from services.scanner.rules import Rules
from tests.repositories import run

CODE = "def area(width, height):\n    return width * height\n"
FILES = {
    "src/geometry.py": CODE,
    "src/copy.py": CODE + "\n",
    "README.md": "# words\n",
    "vendor/tool.go": "package tool\n\nfunc One() int { return 1 }\n",
    "docs/example.py": "print('an example')\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    for path, text in FILES.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    (top / "image.png").write_bytes(b"\x89PNG\0" + bytes(100))
    (top / "large.bin").write_bytes(bytes(600_000))
    (top / "link.py").symlink_to("src/geometry.py")
    return top


def test_every_regular_file_has_a_verdict(folder: Path) -> None:
    found = {one.verdict.path: one for one in local.scan(folder, Rules())}
    assert {path: one.verdict.reason for path, one in found.items()} == {
        "README.md": "NOT_CODE",
        "docs/example.py": "ACCEPTED",
        "image.png": "NOT_TEXT",
        "large.bin": "TOO_LARGE",
        "src/copy.py": "ACCEPTED",
        "src/geometry.py": "DUPLICATE",
        "vendor/tool.go": "VENDORED",
    }
    assert list(found) == sorted(found)
    assert found["docs/example.py"].is_documentation and not found["src/copy.py"].is_documentation
    assert [path for path, one in found.items() if one.is_binary] == ["image.png", "large.bin"]
    assert found["src/geometry.py"].verdict.detail == "same but for line ends and blanks as src/copy.py"
    assert found["large.bin"].verdict.sha256 == hashlib.sha256(bytes(600_000)).hexdigest()


def test_of_a_work_tree_only_what_git_tracks(folder: Path) -> None:
    run(folder, "init", "-q")
    run(folder, "add", "src", "docs")
    (folder / "src" / "later.py").write_text("x = 1\n")
    (folder / "src" / "copy.py").unlink()
    assert {one.verdict.path for one in local.scan(folder, Rules())} == {"docs/example.py", "src/geometry.py"}
    assert {one.verdict.path for one in local.scan(folder / "src", Rules())} == {"geometry.py"}


def test_gitattributes_are_honoured_when_asked(folder: Path) -> None:
    (folder / ".gitattributes").write_text("docs/** linguist-vendored\n")
    for honour, reason in ((False, "ACCEPTED"), (True, "VENDORED")):
        found = {
            one.verdict.path: one.verdict.reason for one in local.scan(folder, Rules(), honour_gitattributes=honour)
        }
        assert found["docs/example.py"] == reason


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument):
        list(local.scan(folder / "README.md", Rules()))


def test_the_command_prints_a_line_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / os.fsdecode(b"src/\xff.py")).write_text(CODE.replace("area", "volume"))
    assert main(["scan", "dry-run", str(folder), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 8
    assert list(rows[0]) == [
        *("path", "size", "sha256", "language", "generated", "vendored", "documentation", "binary"),
        *("reason", "reasons", "detail"),
    ]
    assert "src/\\udcff.py" in {row["path"] for row in rows}
    assert main(["scan", "dry-run", str(folder), "--rejected", "--language-off", "Python"]) == 0
    assert "LANGUAGE_OFF" in capsys.readouterr().out
    assert main(["scan", "dry-run", str(folder / "absent")]) == 2
