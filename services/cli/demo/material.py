"""What the demo works on: a real package's source, packed as an archive, one file of it held out."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from services.core.errors import FailedPrecondition

PACKAGE = "minio"
HELD_OUT = "commonconfig.py"
"""The file that is marked as test. It is in the archive as well: the scanner has to keep that copy out of training."""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package's source."""

    folder: Path
    files: tuple[Path, ...]
    """Its Python files, relative to the folder's parent."""

    @property
    def held_out(self) -> Path:
        """The file to mark as test."""
        return self.folder / HELD_OUT

    def pack(self, target: Path) -> None:
        """Writes the files as a .tar.gz."""
        with tarfile.open(target, "w:gz") as archive:
            for file in self.files:
                archive.add(self.folder.parent / file, str(file))

    def text(self, path: str) -> str:
        """The text of a file, by its path in the archive or, for the held-out file, by its name."""
        file = self.held_out if path == HELD_OUT else self.folder.parent / path
        return file.read_text()


def find_package() -> Package:
    """The source of minio-py, where pip installed it.

    Raises:
        FailedPrecondition: it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FailedPrecondition(f"{PACKAGE} is not installed", hint="Run `make setup`.")
    folder = Path(spec.origin).parent
    files = sorted(file.relative_to(folder.parent) for file in folder.rglob("*.py"))
    return Package(folder, tuple(files))
