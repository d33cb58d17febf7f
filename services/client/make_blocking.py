"""Makes the blocking client from the asynchronous one: ``python -m services.client.make_blocking``.

Both have the same methods; they differ in ``async`` and ``await`` only, so writing them twice would let them
drift apart. A test makes them again and compares. Needs ruff.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RULES = [
    (r"services\.client\.aio", "services.client.blocking"),
    (r"\bAsyncCodegraft\b", "Codegraft"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\bAsyncStream\b", "Stream"),
    (r"\banswer_async\b", "answer"),
    (r"\bchannel_async\b", "blocking_channel"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait asyncio\.to_thread\(([\w.]+)(?:, |(?=\)))", r"\1("),
    (r"\bawait ", ""),
    (r"\bgrpc\.aio\.", "grpc."),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"^import asyncio$", "import time"),
    (r"The asynchronous client\. .*$", 'The blocking client."""'),
]
NOTICE = "# Made by make_blocking.py from services/client/aio; change it there.\n"


def blocking(source: str) -> str:
    """The blocking form of an asynchronous module."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    return NOTICE + source


def make() -> dict[Path, str]:
    """The blocking modules by path, put in order by ruff as all code is."""
    return {
        HERE / "blocking" / path.name: _tidy(blocking(path.read_text())) for path in sorted((HERE / "aio").glob("*.py"))
    }


def _tidy(source: str) -> str:
    # The rules leave imports that are doubled, unused or out of order.
    for arguments in (["check", "--fix", "--quiet", "--select=F401,F811,I"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *arguments, f"--stdin-filename={HERE / 'blocking' / 'module.py'}", "-"]
        source = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return source


if __name__ == "__main__":
    (HERE / "blocking").mkdir(exist_ok=True)
    for path, text in make().items():
        path.write_text(text)
