"""Benchmarks of the scanner: ``python -m bench.scanner [rules] [FOLDER]``.

FOLDER holds checkouts of real repositories; without it, files of this machine's packages stand for them. Through the
whole service: real NATS and S3 servers, one and two scanner processes.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from bench.stage import Stage, stage
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from services.cli.local import ports
from services.cli.local.process import Child
from services.client import Addresses, Codegraft
from services.core.errors import Unavailable

FILES = 12_000
NO_SOURCE = {".so", ".a", ".pyc", ".gz", ".mo", ".png", ".debug", ".jar", ".bc"}
"""What a repository hardly has."""
ROUNDS = 3
LINGUIST = """
ARGF.each_line(chomp: true) do |path|
  blob = Linguist::FileBlob.new(path)
  blob.language; blob.generated?; blob.vendored?
end
"""


def tree(folder: Path | None = None) -> list[Path]:
    """The files of a folder.

    Without one, files of many languages, as packages of this machine bring them: of each at most a tenth.
    """
    if folder is not None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
        return files[:: -(-len(files) // FILES)]
    by_suffix: dict[str, list[Path]] = defaultdict(list)
    for top in (Path(sysconfig.get_paths()["purelib"]), Path("/usr/include"), Path("/usr/lib"), Path("/usr/share")):
        for path in sorted(top.rglob("*")):
            is_file = path.is_file() and not path.is_symlink() and path.suffix not in NO_SOURCE
            if is_file and 0 < path.stat().st_size <= 512 * 1024:
                by_suffix[path.suffix].append(path)
    chosen: list[Path] = []
    for paths in by_suffix.values():
        step = max(1, -(-len(paths) // (FILES // 10)))
        chosen += paths[::step]
    return sorted(chosen[:: max(1, len(chosen) // FILES)][:FILES])


@contextmanager
def scanners(on: Stage, count: int) -> Iterator[tuple[Codegraft, list[Child]]]:
    """So many scanner processes, and a client that knows the first."""
    chosen = ports.choose([f"scanner-{number}" for number in range(count)], {})
    children = []
    for name, port in chosen.items():
        environment = {**on.environment, "CODEGRAFT_LISTEN": f"{ports.HOST}:{port}", "CODEGRAFT_SCANNER_NICE": "0"}
        environment["CODEGRAFT_CACHE_DIR"] = str(on.folder / name)
        command = [sys.executable, "-m", "services.scanner"]
        children.append(Child.start(name, command, log=on.folder / f"{name}.log", env=environment, cwd=on.folder))
    try:
        address = f"{ports.HOST}:{chosen['scanner-0']}"
        with Codegraft(Addresses(on.address, address, address, address), timeout=600) as client:
            for _ in range(300):
                try:
                    list(client.scans.list("p"))
                    break
                except Unavailable:
                    time.sleep(0.1)
            time.sleep(2)  # until the others take parts, too
            yield client, children
    finally:
        for child in children:
            child.stop(timedelta(seconds=10))


def _snapshot(on: Stage, paths: list[Path]) -> str:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in paths:
            tar.add(path, arcname=str(path).lstrip("/"), recursive=False)
    on.client.projects.create("p")
    on.client.sources.wait(on.client.sources.add_archive("p", packed.getvalue(), source_id="tree").name)
    return on.client.snapshots.create("p").name


def _scan(client: Codegraft, snapshot: str, settings: ScanSettings) -> Scan:
    return client.scans.wait(client.scans.create("p", snapshot, settings).name)


def _peak(child: Child) -> float:
    return int(Path(f"/proc/{child.pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1000


def rules(folder: Path | None) -> None:
    """Stage 1: files a second of one process and of two, against Ruby's github-linguist alone."""
    paths = tree(folder)
    size = sum(path.stat().st_size for path in paths)
    print(f"rules: {len(paths):,} files, {size / 1e6:.0f} MB, {ROUNDS} rounds, medians")
    if shutil.which("github-linguist"):
        listed = "".join(f"{path}\n" for path in paths).encode()
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run(["ruby", "-rlinguist", "-e", LINGUIST], input=listed, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        print(f"  github-linguist alone      {len(paths) / statistics.median(seconds):7,.0f} files/s")
    with stage() as on:
        taken = _snapshot(on, paths)
        rates = {}
        for count in (1, 2):
            with scanners(on, count) as (client, children):
                seconds = []
                for _ in range(ROUNDS):
                    found = _scan(client, taken, ScanSettings(loss_filter=False))
                    seconds.append(found.report.stage1_seconds)
                rates[count] = len(paths) / statistics.median(seconds)
                peak = max(_peak(child) for child in children)
                name = f"{count} scanner process" + "es" * (count > 1)
                print(f"  {name:26} {rates[count]:7,.0f} files/s   peak {peak:.0f} MB")
        print(f"  two against one            {rates[2] / rates[1]:.2f} (asked: 1.8, and 1,500 files/s, under 600 MB)")
        counts = {reason: count.files for reason, count in sorted(found.report.reasons.items())}
        print(f"  verdicts: {counts}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    known = {"rules": rules}
    folders = [Path(name) for name in sys.argv[1:] if name not in known]
    for name in [name for name in sys.argv[1:] if name in known] or known:
        known[name](folders[0] if folders else None)
