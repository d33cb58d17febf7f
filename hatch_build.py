"""Makes the Python code of the contract: protos/codegraft/** -> gen/codegraft/**, with type stubs.

It is both hatchling's build hook (wheels carry the result, editable installs find it through ``dev-mode-dirs``) and a
script: ``python hatch_build.py`` after a change of a .proto file. Nothing is done when gen/ is up to date, and a file
whose content stays the same is not touched, so that running programs never see a half-made package.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "codegraft"
STAMP = ".made-from"
GENERATORS = ("grpcio-tools", "mypy-protobuf")


class ProtoBuildHook(BuildHookInterface[Any]):
    """Generates before every build and puts the result into wheels, which git-ignored files would not reach."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        generate(root)
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"][str(root / "gen" / PACKAGE)] = PACKAGE


def generate(root: Path) -> bool:
    """Brings ``root``/gen up to date with ``root``/protos; True when it had to generate."""
    protos = sorted((root / "protos").rglob("*.proto"))
    gen = root / "gen"
    digest = _digest(root, protos)
    stamp = gen / STAMP
    if stamp.exists() and stamp.read_text() == digest:
        return False
    gen.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gen, prefix=".making-") as folder:
        made = Path(folder)
        _protoc(root / "protos", protos, made)
        (made / PACKAGE / "py.typed").touch()
        _replace(made / PACKAGE, gen / PACKAGE)
    stamp.write_text(digest)
    return True


def _digest(root: Path, protos: list[Path]) -> str:
    """Hash of all that the result depends on: the sources, their names, and the generators' versions."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for generator in GENERATORS:
        digest.update(f"{generator}=={version(generator)}\0".encode())
    for proto in protos:
        content = proto.read_bytes()
        digest.update(f"{proto.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _protoc(include: Path, protos: list[Path], out: Path) -> None:
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"--proto_path={include}",
        f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(proto) for proto in protos),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its messages are above")


def _plugin(name: str) -> str:
    """The generator's path: beside this interpreter, or on PATH as pip's isolated builds have it."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"{name} is missing: pip install mypy-protobuf")
    return found


def _replace(made: Path, target: Path) -> None:
    """Makes ``target`` equal to ``made``, touching only files that differ."""
    wanted = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    for relative in wanted:
        old, new = target / relative, made / relative
        if not old.exists() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            new.replace(old)
    for path in target.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target) not in wanted:
            path.unlink()


if __name__ == "__main__":
    sys.stderr.write("generated gen/\n" if generate(Path(__file__).resolve().parent) else "gen/ is up to date\n")
