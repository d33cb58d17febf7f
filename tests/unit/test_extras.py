"""Each service installs alone: what its room imports comes with its extra, and no more than that is loaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SERVICES = Path(__file__).parents[2] / "services"
ROOMS = {room: room for room in ("ingest", "scanner", "trainer", "inference", "gateway")} | {"client": ""}

WITHOUT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {others} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
package = importlib.import_module("services.{room}")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
"""Loads every module of a room as if the other distributions were not installed."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(extra: str) -> set[str]:
    """Distributions that ``pip install codegraft[extra]`` brings."""
    found: set[tuple[str, str]] = set()
    waiting = [("codegraft", extra), ("codegraft", "")]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        for line in metadata.distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                waiting += [(normal(requirement.name), each) for each in ("", *requirement.extras)]
    return {name for name, _ in found}


def modules_by_presence(extra: str) -> tuple[set[str], set[str]]:
    """Top-level modules that the extra brings, and those of everything else that is installed here."""
    brought = closure(extra)
    inside: set[str] = set()
    outside: set[str] = set()
    for module, distributions in metadata.packages_distributions().items():
        (inside if brought & {normal(name) for name in distributions} else outside).add(module)
    return inside, outside - inside


def imports(room: Path) -> Iterator[tuple[str, str]]:
    """(top-level module, place) of every import, also of those inside functions."""
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for name in names:
                yield name.partition(".")[0], f"{path.relative_to(room.parent)}:{getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_extra_brings(room: str) -> None:
    _, outside = modules_by_presence(ROOMS[room])
    missing = [f"{place} imports {module}" for module, place in imports(SERVICES / room) if module in outside]
    assert not missing


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_loads_with_its_extra_alone(room: str) -> None:
    _, outside = modules_by_presence(ROOMS[room])
    script = WITHOUT.format(others=outside, room=room)
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert loaded.returncode == 0, loaded.stderr[-2000:]


@pytest.mark.parametrize("extra", ["", "ingest", "gateway", "cli"])
def test_no_torch_where_none_is_needed(extra: str) -> None:
    assert "torch" not in closure(extra)
