"""FILE:LINE: the code on both sides of a cursor, and what is told when there is no such place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli import location
from services.core.errors import InvalidArgument, NotFound

TEXT = "def f():\n    return 1\n\nlast"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.py"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        ("1", "def f():"),
        ("2", "def f():\n    return 1"),
        ("2:1", "def f():\n"),
        ("2:5", "def f():\n    "),
        ("2:13", "def f():\n    return 1"),
        ("3", "def f():\n    return 1\n"),
        ("4", TEXT),
    ],
)
def test_the_cursor_splits_the_text(file: Path, place: str, prefix: str) -> None:
    cursor = location.read(f"{file}:{place}")
    assert cursor.prefix == prefix
    assert cursor.prefix + cursor.suffix == TEXT
    assert cursor.path == str(file)


@pytest.mark.parametrize("place", ["", ":0", ":5", ":2:0", ":2:14", ":x", ":-1"])
def test_a_place_outside_is_refused(file: Path, place: str) -> None:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        location.read(f"{file}{place}")
    assert caught.value.field


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        location.read(f"{tmp_path}/missing.py:1")
    with pytest.raises(NotFound):
        location.read(f"{tmp_path}:1")
    (tmp_path / "b.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument, match="UTF-8"):
        location.read(f"{tmp_path}/b.py:1")


def test_an_empty_file_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    assert location.read(f"{tmp_path}/empty.py:1").prefix == ""


@given(text=st.text(st.characters(codec="utf-8"), max_size=80), data=st.data())
def test_nothing_is_lost_at_any_line(text: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "a.py"
    path.write_bytes(text.encode())
    line = data.draw(st.integers(1, max(1, len(text.splitlines()))))
    cursor = location.read(f"{path}:{line}")
    assert cursor.prefix + cursor.suffix == text
