"""Benchmarks of the scanner: ``python -m bench.scanner [rules] [losses] [FOLDER]``; both when none is named.

FOLDER holds checkouts of real repositories; without it, files of this machine's packages stand for them. Through the
whole service: real NATS and S3 servers, one and two scanner processes.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.stage import Stage, stage
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from services.cli.local import ports
from services.cli.local.process import Child
from services.client import Addresses, Codegraft
from services.core.errors import Unavailable
from services.core.models import catalogue, weights
from services.scanner.loss import LossMeter
from services.scanner.meter import CPU_BATCH_TOKENS
from services.scanner.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = 12_000
NO_SOURCE = {".so", ".a", ".pyc", ".gz", ".mo", ".png", ".debug", ".jar", ".bc"}
"""What a repository hardly has."""
ROUNDS = 3
CGROUPS = Path("/sys/fs/cgroup/cpu")
"""Version 1's controller of processor time, where this machine has it and lets us."""
LOSS_TOKENS = 30_000
MATMUL_SIZE = 2048
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
def half_cores(children: list[Child]) -> Iterator[None]:
    """Gives each process half a core at most (a control group of its own), as machines of one size would."""
    groups = [CGROUPS / f"codegraft-bench-{child.pid}" for child in children]
    try:
        for group, child in zip(groups, children, strict=True):
            group.mkdir()
            (group / "cpu.cfs_quota_us").write_text("50000")  # of the period's 100,000
            (group / "cgroup.procs").write_text(str(child.pid))
        yield
    finally:
        for group, child in zip(groups, children, strict=True):
            if group.is_dir():
                (CGROUPS / "cgroup.procs").write_text(str(child.pid))
                group.rmdir()


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


def _cpu(child: Child) -> float:
    """Seconds of processor time so far."""
    numbers = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


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
                used = sum(map(_cpu, children))
                for _ in range(ROUNDS):
                    found = _scan(client, taken, ScanSettings(loss_filter=False))
                    seconds.append(found.report.stage1_seconds)
                rates[count] = len(paths) / statistics.median(seconds)
                used = (sum(map(_cpu, children)) - used) / ROUNDS
                peak = max(_peak(child) for child in children)
                name = f"{count} scanner process" + "es" * (count > 1)
                print(f"  {name:26} {rates[count]:7,.0f} files/s   peak {peak:.0f} MB   {used:.1f} processor seconds")
        print(f"  two against one            {rates[2] / rates[1]:.2f} (asked: 1.8, and 1,500 files/s, under 600 MB)")
        if os.access(CGROUPS, os.W_OK):
            # Here one process uses both cores already; what a second one adds elsewhere shows when neither can.
            for count in (1, 2):
                with scanners(on, count) as (client, children), half_cores(children):
                    seconds = [
                        _scan(client, taken, ScanSettings(loss_filter=False)).report.stage1_seconds
                        for _ in range(ROUNDS)
                    ]
                rates[count] = len(paths) / statistics.median(seconds)
                print(f"  {count} of half a core each       {rates[count]:7,.0f} files/s")
            print(f"  two against one            {rates[2] / rates[1]:.2f} (asked: 1.8)")
        counts = {reason: count.files for reason, count in sorted(found.report.reasons.items())}
        print(f"  verdicts: {counts}")


def losses(folder: Path | None) -> None:
    """Stage 2: tokens a second, against a plain loop and this machine's matrix products; and the cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from services.scanner import attention

    base = weights.ensure_weights(catalogue.find(catalogue.DEFAULT_MODEL), Path.home() / ".cache/codegraft")
    # Both sides compute in the type that this processor is quick with.
    dtype = weights.quick_dtype("cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model, tokenizer = weights.load_model(base), weights.load_tokenizer(base)
    attention.use(model)
    rules = Rules()
    paths = _sample(folder, tokenizer)
    texts = [(str(path), path.read_text()) for path in paths]
    tokens = sum(min(len(tokenizer(text).input_ids), rules.max_tokens_per_file) for _, text in texts)
    print(f"losses: {len(texts)} files, {tokens:,} tokens, {ROUNDS} rounds, medians")
    meter = LossMeter(
        model,
        tokenizer,
        window_tokens=rules.window_tokens,
        max_tokens=rules.max_tokens_per_file,
        batch_tokens=CPU_BATCH_TOKENS,
    )

    def plainly(window: int) -> None:
        """The peer: file by file, the loss that transformers computes itself."""
        for _, text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, : rules.max_tokens_per_file]
            for part in ids.split(window, dim=1):
                with torch.inference_mode():
                    plain(input_ids=part, labels=part).loss.item()

    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype) for _ in range(2))
    seconds: dict[str, list[float]] = defaultdict(list)
    read = 0
    for _ in range(ROUNDS):
        seconds["matmul"].append(min(_seconds(lambda: a @ b) for _ in range(20)))
        seconds["whole"].append(_seconds(lambda: plainly(rules.max_tokens_per_file)))
        seconds["windows"].append(_seconds(lambda: plainly(rules.window_tokens)))
        counted: list[int] = []
        seconds["ours"].append(_seconds(lambda: list(meter.measure(texts, on_batch=counted.append))))  # noqa: B023
        read = sum(counted)
    matmul = 2 * MATMUL_SIZE**3 / statistics.median(seconds["matmul"])
    parameters = sum(weight.numel() for weight in model.parameters())
    rate = 2 * parameters * read / statistics.median(seconds["ours"])
    print(f"  matrix products, {str(dtype)[6:]:8}  {matmul / 1e9:7.0f} GFLOP/s")
    print(f"  stage 2                    {read / statistics.median(seconds['ours']):7.0f} tokens/s")
    print(f"  of the products' rate      {rate / matmul:7.0%} (asked: 60 %)")
    for peer, how in {"whole": "whole files", "windows": f"windows of {rules.window_tokens}"}.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[peer], seconds["ours"], strict=True))
        print(f"  plain loop, {how:14} {tokens / statistics.median(seconds[peer]):7.0f} tokens/s")
        print(f"  against it                 {ratio:7.2f} (asked: 1.5)")
    with stage() as on, scanners(on, 1) as (client, _):
        taken = _snapshot(on, paths)
        for name, settings in {
            "first scan": ScanSettings(),
            "another threshold": ScanSettings(max_loss=2.0),
        }.items():
            report = _scan(client, taken, settings).report
            measured = sum(language.files for language in report.losses.values())
            print(f"  {name:18} {report.stage2_seconds:6.1f} s, {report.cached_losses} of {measured} from the cache")


def _sample(folder: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Files of all lengths up to some number of tokens."""
    paths = [path for path in tree(folder) if path.suffix not in {".json", ".svg", ".lock", ".txt", ".md"}]
    random.Random(0).shuffle(paths)
    chosen, tokens = [], 0
    for path in paths:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        count = len(tokenizer(text).input_ids) if len(text) <= 100_000 else 0
        if count >= 64:
            chosen.append(path)
            tokens += count
        if tokens >= LOSS_TOKENS:
            break
    return sorted(chosen)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    known = {"rules": rules, "losses": losses}
    folders = [Path(name) for name in sys.argv[1:] if name not in known]
    for name in [name for name in sys.argv[1:] if name in known] or known:
        known[name](folders[0] if folders else None)
