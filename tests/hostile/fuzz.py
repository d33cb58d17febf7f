"""Fuzzes every reader of ingest: ``python -m tests.hostile.fuzz --inputs 100000 --seed 1``.

Inputs are the hostile corpus and plain archives, mutated: bytes bent, cut, doubled and spliced, and for text made of
parts that parsers trip over. Any exception but a domain error is a crash; so is a path that is not safe. The first
crash ends the run with its input in a file.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from services.core.errors import CodegraftError
from services.ingest import credentials
from services.ingest.files import FoundFile, plain_path
from services.ingest.limits import Limits, Meter
from services.ingest.sources import archive, git, url
from services.ingest.sources.guard import Guard
from tests.hostile import archives

MiB = 1 << 20
LIMITS = Limits(max_total_bytes=8 * MiB, max_file_bytes=MiB, ratio_free_bytes=MiB, max_files=2000, max_seconds=20)
SEED_BYTES = 64 << 10
"""Longer cases of the corpus make slow inputs and no new ones."""
TOKENS = [
    *("https://", "ssh://", "ext::", "file://", "git@", "-", "--upload-pack=", "@", ":", "/", "\\", "..", ".", "[::1]"),
    *("127.0.0.1", "169.254.169.254", "example.com", "0x7f.1", "%2e", "%00", "\0", "\n", "\r", "\u202e", "\ud800", " "),
    *("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAI", "|1|", "*", "?", "#", "^", "~", "@{", ".lock", "refs/heads/", "é"),
    *("999999", "-1", "xn--", "[", "]", "a", "main", ".git"),
]
HOST_KEY = base64.b64encode(struct.pack(">I11sI32s", 11, b"ssh-ed25519", 32, bytes(range(32)))).decode()

Target = Callable[[random.Random, Path], object]


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """The data, bent in one to eight places."""
    bent = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(bent) + 1)
        match rng.randrange(7):
            case 0 if at < len(bent):
                bent[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(bent):
                bent[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del bent[at : at + rng.randint(1, 600)]
            case 3:
                bent[at:at] = bent[at : at + rng.randint(1, 600)]
            case 4:
                bent[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"PK\x03\x04"))
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                bent[at : at + 512] = other[start : start + 512]
            case _:
                bent = bent[: max(at, 1)]
    return bytes(bent)


def text(rng: random.Random) -> str:
    """Parts that parsers trip over, in any order."""
    return "".join(rng.choice(TOKENS) for _ in range(rng.randint(0, 9)))


class Readers:
    """The fuzzed readers, each taking its input from the generator."""

    def __init__(self) -> None:
        """Takes the seeds from the corpus."""
        self.seeds = [case.data for case in archives.corpus() if len(case.data) <= SEED_BYTES]
        self.guard = Guard()

    def archive(self, rng: random.Random, folder: Path) -> bytes:
        """Reads a mutated archive; every path that comes out must be safe."""
        data = mutated(rng.choice(self.seeds), rng, self.seeds)
        if rng.random() < 0.1:
            data = gzip.compress(data, compresslevel=1)
        path = folder / "input"
        path.write_bytes(data)
        archive.is_archive(path)
        for entry in archive.read(path, rng.choice(("", "src")), Meter(LIMITS)):
            if isinstance(entry, FoundFile) and plain_path(entry.path, LIMITS) != entry.path:
                raise AssertionError(f"the path {entry.path!r} is let in")
        return data

    def path(self, rng: random.Random, folder: Path) -> object:
        """Checks a path; one that is let in stays what it is."""
        path = plain_path(text(rng), LIMITS)
        if path is not None and (path.startswith("/") or ".." in path.split("/") or plain_path(path, LIMITS) != path):
            raise AssertionError(f"the path {path!r} is let in")
        return path

    def git_url(self, rng: random.Random, folder: Path) -> object:
        """Checks the address of a repository."""
        given = rng.choice(("https://", "ssh://", "", "git@")) + text(rng)
        checked = git.check_url(given, self.guard)
        if checked.startswith("-") or any(character in checked for character in "\0\r\n"):
            raise AssertionError(f"the address {checked!r} is let in")
        return checked

    def ref(self, rng: random.Random, folder: Path) -> object:
        """Checks a ref."""
        ref = text(rng)
        git.check_ref(ref)
        if ref.startswith("-"):
            raise AssertionError(f"the ref {ref!r} is let in")
        return ref

    def url(self, rng: random.Random, folder: Path) -> object:
        """Checks the address of a file."""
        return url.check_url(rng.choice(("https://", "")) + text(rng), self.guard)

    def known_hosts(self, rng: random.Random, folder: Path) -> object:
        """Checks lines of known_hosts, half of them with a key that is one."""
        key = rng.choice((f" ssh-ed25519 {HOST_KEY}", " " + text(rng)))
        return credentials.check_known_hosts([text(rng) + key])


def fuzz(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Feeds the readers in turn; half of the inputs are archives.

    Returns:
        How often each outcome came: ``reader: read`` or ``reader: REASON``.

    Raises:
        Exception: what a reader let through that is no domain error, with the input's number as a note.
    """
    readers = Readers()
    texts: list[Target] = [readers.path, readers.git_url, readers.ref, readers.url, readers.known_hosts]
    outcomes: Counter[str] = Counter()
    for number in range(inputs):
        rng = random.Random(f"{seed} {number}")
        target: Target = readers.archive if number % 2 else texts[number // 2 % len(texts)]
        name = getattr(target, "__name__", "reader")
        try:
            target(rng, folder)
            outcomes[f"{name}: read"] += 1
        except CodegraftError as error:
            outcomes[f"{name}: {error.reason}"] += 1
        except Exception as error:
            error.add_note(f"input {number} of seed {seed}, for {name}")
            raise
        if (number + 1) % 10_000 == 0:
            print(f"  {number + 1:,} inputs", flush=True)
    return outcomes


def main() -> int:
    """Runs the fuzzer; 1 after a crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="codegraft-fuzz-") as folder:
        try:
            outcomes = fuzz(given.inputs, given.seed, Path(folder))
        except Exception:
            crash = Path(tempfile.gettempdir()) / f"codegraft-crash-{given.seed}"
            if (last := Path(folder) / "input").exists():
                crash.write_bytes(last.read_bytes())
                print(f"the archive that was read last is kept as {crash}", file=sys.stderr)
            raise
    for outcome, count in sorted(outcomes.items()):
        print(f"  {outcome:45} {count:7,}")
    print(f"{given.inputs:,} inputs without a crash in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
