"""A real OpenSSH server on loopback that serves git repositories to the keys it is given."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.cli.local import ports


@dataclass
class SshServer:
    """A running sshd."""

    folder: Path
    port: int

    @property
    def user(self) -> str:
        return getpass.getuser()

    @property
    def host_key(self) -> str:
        """Its line for known_hosts."""
        return f"[127.0.0.1]:{self.port} {(self.folder / 'host_key.pub').read_text().rsplit(' ', 1)[0]}"

    def url(self, repository: Path) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{repository}"

    def admit(self, public_key: str) -> None:
        """Lets who has the key's other half in, for git and nothing else."""
        with (self.folder / "authorized_keys").open("a") as file:
            file.write(f"restrict {public_key}\n")


@contextmanager
def serving(folder: Path) -> Iterator[SshServer]:
    """Runs sshd as the current user."""
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    assert sshd, "these tests need OpenSSH's server: apt-get install openssh-server (make test does it for root)"
    folder.mkdir(mode=0o700)
    server = SshServer(folder, ports.choose(["ssh"], {})["ssh"])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True)
    (folder / "authorized_keys").touch(mode=0o600)
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {server.port}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nUsePAM no\nPermitRootLogin yes\nLogLevel ERROR\n"
        'ForceCommand git -c safe.directory="*" -c uploadpack.allowFilter=true shell -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # its privilege separation wants it
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        deadline = time.monotonic() + 10
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(10)
