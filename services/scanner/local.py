"""Stage 1 over a folder of this machine, without any server: what a scan would say before it measures losses."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path

from services.core.errors import InvalidArgument
from services.core.masks import Masks
from services.core.store import Place
from services.scanner import attributes, examined, languages, pipeline
from services.scanner.attributes import Attributes
from services.scanner.languages import Traits
from services.scanner.pipeline import Entry
from services.scanner.rules import Rules
from services.scanner.secrets import Finder
from services.scanner.snapshot import File
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Verdict

_NOWHERE = Place("", 0)
_SHARD_FILES = 512
"""Files whose texts are in memory at once."""
_READ_BYTES = 16 << 20
"""The largest file whose content is looked at, be it too large or not."""


@dataclass(frozen=True, slots=True)
class Local:
    """One file of the folder."""

    verdict: Verdict
    traits: Traits
    is_binary: bool
    is_documentation: bool


def scan(
    folder: Path, rules: Rules, finder: Finder | None = None, *, honour_gitattributes: bool = False
) -> Iterator[Local]:
    """The verdict of every file of a folder, by path; of a git work tree, of those that git tracks.

    Args:
        rules: stage 2 does not run, whatever they say of it.
        finder: of secrets; None looks for none.

    Raises:
        InvalidArgument: the path is no folder.
    """
    if not folder.is_dir():
        raise InvalidArgument(f"{folder} is no folder", field="path", hint="Give a folder, or a git work tree.")
    paths = sorted(_tracked(folder) or _walked(folder))
    found = Attributes(_attributes(folder, paths)) if honour_gitattributes else attributes.NONE
    masks = SourceMasks(
        exclude=Masks(rules.exclude, field="exclude"),
        include=Masks([]),
        force=Masks(rules.force_include, field="force_include"),
        attributes=found,
    )
    entries: list[Entry] = []
    binary: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="codegraft-dry-run-") as name:
        shards: list[Path] = []
        for begin in range(0, len(paths), _SHARD_FILES):
            shard: list[Entry] = []
            texts: list[str] = []
            for path in paths[begin : begin + _SHARD_FILES]:
                file = folder / path
                if file.is_symlink() or not file.is_file():
                    continue
                size = file.stat().st_size
                digest, head, content = _read(file, size <= max(rules.max_file_bytes, _READ_BYTES))
                # A name that is no UTF-8 is told with its bytes escaped.
                told = path.encode(errors="backslashreplace").decode()
                listed = File("", told, size, digest, "AUTO", _NOWHERE)
                entry, text = pipeline.examine(listed, content, rules, masks, finder)
                shard.append(entry)
                texts.append(text)
                binary.append(languages.is_binary(head))
            shards.append(Path(name) / f"{len(shards):05}.parquet")
            shards[-1].write_bytes(examined.to_parquet(shard, examined.signatures(shard, texts), first=len(entries)))
            entries += shard
        pipeline.mark_duplicates(entries, shards, rules)
    verdicts = pipeline.conclude(entries, replace(rules, loss_filter=False))
    for entry, verdict, is_binary in zip(entries, verdicts, binary, strict=True):
        documentation = entry.traits.documentation
        if documentation is None:
            documentation = languages.is_documentation(entry.file.path)
        yield Local(verdict, entry.traits, is_binary, documentation)


def _tracked(folder: Path) -> list[str]:
    """The files below the folder that git tracks; none when it is no work tree."""
    # A repository's own settings may name programs to run; none of these is needed to read the index.
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(folder)]
    try:
        listed = subprocess.run([*command, "ls-files", "-z"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]


def _walked(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        for name in files:
            yield os.path.relpath(os.path.join(root, name), folder)


def _read(path: Path, whole: bool) -> tuple[str, bytes, bytes | None]:
    """SHA-256, the beginning, and the content where it is wanted; empty for what cannot be read."""
    try:
        with path.open("rb") as file:
            if whole:
                content = file.read()
                return sha256(content).hexdigest(), content, content
            head = file.read(1 << 16)
            file.seek(0)
            return file_digest(file, "sha256").hexdigest(), head, None
    except OSError:
        return "", b"", None


def _attributes(folder: Path, paths: list[str]) -> dict[str, str]:
    names = [path for path in paths if path.rpartition("/")[2] == attributes.FILE]
    return {name: (folder / name).read_text(errors="replace") for name in names}
