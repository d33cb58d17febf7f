"""Makes the blocking client from the asynchronous one: ``python -m services.client.make_blocking``.

Both have the same methods; they differ in ``async`` and ``await`` only, so writing them twice would let them
drift apart. A test makes them again and compares.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RULES = [
    (r"services\.client\.aio", "services.client.blocking"),
    (r"\bAsyncCodegraft\b", "Codegraft"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bgrpc\.aio\.", "grpc."),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"^import asyncio$", "import time"),
    (r"^import secrets\nimport time$", "import secrets\nimport time"),
    (r"import Iterator, Iterator, ", "import Iterator, "),
    (r"The asynchronous client\. .*$", 'The blocking client."""'),
]
NOTICE = "# Made by make_blocking.py from services/client/aio; change it there.\n"


def blocking(source: str) -> str:
    """The blocking form of an asynchronous module."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    return NOTICE + source


def make() -> dict[Path, str]:
    """The blocking modules by path, before formatting."""
    return {HERE / "blocking" / path.name: blocking(path.read_text()) for path in sorted((HERE / "aio").glob("*.py"))}


if __name__ == "__main__":
    (HERE / "blocking").mkdir(exist_ok=True)
    for path, text in make().items():
        path.write_text(text)
