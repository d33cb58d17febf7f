"""Running git: nothing of the machine's configuration, bounded in time and disk, ended with all its children."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from services.core import disk
from services.core.errors import DiskFull, LimitExceeded, SourceUnreachable
from services.ingest.limits import Meter

CONFIG = {
    "core.askPass": "true",
    "core.bigFileThreshold": "16m",
    "core.deltaBaseCacheLimit": "32m",
    # What a crash of the machine tears here is fetched again.
    "core.fsync": "none",
    "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null",
    "core.symlinks": "false",
    "credential.helper": "",
    "fetch.fsckObjects": "true",
    "fetch.recurseSubmodules": "false",
    "fetch.unpackLimit": "1",
    "gc.auto": "0",
    # No redirects by git itself: each would have to be checked. This also makes it ignore http-alternates.
    "http.followRedirects": "false",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "init.defaultBranch": "main",
    "maintenance.auto": "false",
    "pack.threads": "2",
    "protocol.allow": "never",
    "protocol.version": "2",
    "submodule.recurse": "false",
    "transfer.bundleURI": "false",
}
OUTPUT_BYTES = 256 << 20
"""Most that git may print: the refs of a repository with millions of them."""
ERROR_BYTES = 1 << 16
"""Kept of what it says besides."""
_NOISE = ("warning:", "Please make sure you have the correct access", "and the repository exists", "@@@")
_COUNTED = re.compile(r"(?:remote: )?(?:[A-Z][a-z]+ (?:objects|deltas): +\d|Total \d+ \(delta )[^\r\n]*")
"""How far it is; the remote's comes through another process, so anywhere among the lines that say what is wrong."""
_TICK = 200
"""Milliseconds between two looks at a running git."""
_PROGRESS = re.compile(rb"(?:remote: )?([A-Z][a-z]+ (?:objects|deltas)): +\d+% \((\d+)/(\d+)\)[^\r\n]*[\r\n]?[^\r\n]*$")


@dataclass(frozen=True, slots=True)
class Git:
    """git in one bare repository."""

    folder: Path
    meter: Meter
    config: Mapping[str, str] = field(default_factory=dict)
    """Settings besides CONFIG."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables besides ours."""

    def run(self, *arguments: str, stdin: bytes = b"") -> Done:
        """Runs git to its end.

        Raises:
            LimitExceeded: it takes too long or writes too much.
            DiskFull: there is no room for what it writes.
            Cancelled: the reading was stopped.
            SourceUnreachable: there is no git.
        """
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin)
            given.seek(0)
            process = self._start(arguments, given, out, err)
            try:
                _await(process, self.meter, lambda: self._look(out, err))
            finally:
                _end(process)
            out.seek(0)
            done = Done(process.returncode, out.read(), _last_lines(err).decode(errors="replace"))
        ours = "\n".join(line for line in done.errors.splitlines() if not line.startswith("remote:"))
        if done.code and (why := disk.complaint(ours)):
            raise DiskFull.of(self.folder.parent, why)
        return done

    @contextmanager
    def talk(self, *arguments: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """git with pipes to its input and from its output; ended in any case, at the latest by the clock."""
        process = self._start(arguments, subprocess.PIPE, subprocess.PIPE, subprocess.DEVNULL)
        assert process.stdin and process.stdout
        # Reading from a pipe cannot be timed out: the clock ends the process, and that ends the reading.
        clock = threading.Timer(self.meter.seconds_left, _end, [process])
        clock.start()
        try:
            yield process.stdin, process.stdout
        finally:
            clock.cancel()
            _end(process)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def _start(
        self, arguments: Sequence[str], stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                ["git", "--git-dir", str(self.folder), *arguments],
                env=self._variables(),
                cwd=self.folder if self.folder.is_dir() else self.folder.parent,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise SourceUnreachable("git is not installed where the service runs", hint="Install git there.") from None

    def _variables(self) -> dict[str, str]:
        config = {**CONFIG, **self.config}
        kept = {name: os.environ[name] for name in ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
        numbered = {"GIT_CONFIG_COUNT": str(len(config))}
        for number, (key, value) in enumerate(config.items()):
            numbered[f"GIT_CONFIG_KEY_{number}"], numbered[f"GIT_CONFIG_VALUE_{number}"] = key, value
        return {
            **kept,
            **numbered,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "HOME": "/nonexistent",
            "LC_ALL": "C",
            **self.environment,
        }

    def _look(self, out: IO[bytes], err: IO[bytes]) -> None:
        """Compares what is on the disk with the limits, and tells how far git is."""
        self.meter.check_size(sum(_size(path) for path in (self.folder / "objects").rglob("*")))
        if os.fstat(out.fileno()).st_size + os.fstat(err.fileno()).st_size > OUTPUT_BYTES:
            raise LimitExceeded("git prints too much", hint="Ask for one branch of the repository.")
        size = os.fstat(err.fileno()).st_size
        if told := _PROGRESS.search(os.pread(err.fileno(), 400, max(0, size - 400))):
            self.meter.tell(told[1].decode().lower(), int(told[2]), int(told[3]))


@dataclass(frozen=True, slots=True)
class Done:
    """What a finished git left."""

    code: int
    output: bytes
    errors: str

    @property
    def complaint(self) -> str:
        """The last lines of what it said, but for how far it was."""
        told = re.split(r"[\r\n]+", _COUNTED.sub("\n", self.errors))
        lines = [line.strip() for line in told if line.strip() and not line.startswith(_NOISE)]
        return " ".join(lines[-3:])[:500] or f"git ended with {self.code}"


def _await(process: subprocess.Popen[bytes], meter: Meter, look: object) -> None:
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(_TICK):
            meter.check_time()
            assert callable(look)
            look()
    finally:
        os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends git and what it started; it has a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(err: IO[bytes]) -> bytes:
    """The end of what git said: what is wrong comes last, after how far it was each second."""
    size = os.fstat(err.fileno()).st_size
    err.seek(max(0, size - ERROR_BYTES))
    said = err.read()
    return said if size <= ERROR_BYTES else re.sub(rb"^[^\r\n]*", b"", said)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # git has just moved it
        return 0
