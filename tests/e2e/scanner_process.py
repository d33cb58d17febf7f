"""The processes of test_scan_replicas.py: the real scanner over the real NATS and S3 servers.

This process only imports what is slow to import, and no Go (enry), which does not survive a fork. Then it forks a
scanner for each line on its standard input, which is the scanner's number, and answers with its process id.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import services.scanner.allocators  # noqa: F401  (before Arrow is loaded)

# isort: split
import duckdb  # noqa: F401  (slow to import, like all these)
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from services.cli.local.process import end_with_parent
from services.core import runtime


def scan(number: str) -> int:
    """A scanner with a cache and a log of its own; its exit status."""
    log = os.open(f"scanner-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["CODEGRAFT_CACHE_DIR"] = str(Path(f"cache-{number}").absolute())
    from services.scanner.__main__ import main
    from services.scanner.config import ScannerSettings

    return runtime.run("scanner", ScannerSettings, main)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    print("ready", flush=True)
    for line in sys.stdin:
        tie = end_with_parent()
        child = os.fork()
        if not child:
            tie()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(scan(line.strip()))
        print(child, flush=True)
