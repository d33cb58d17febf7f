"""Code that is not of the company: an adapter must not forget it.

Files that come with Python, torch and numpy, so that every trainer has them without a download, under permissive
licences (PSF, BSD). A base model predicts them about as well as any other public code.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from services.trainer.corpus.data import Document

_FILES = {
    "": ("heapq.py", "shlex.py", "fractions.py", "textwrap.py", "graphlib.py", "cmd.py"),
    "torch": (
        "include/ATen/core/List.h",
        "include/c10/core/Allocator.h",
        "include/torch/csrc/api/include/torch/nn/modules/linear.h",
        "utils/model_dump/code.js",
    ),
    "numpy": ("_core/include/numpy/ndarrayobject.h", "_core/include/numpy/npy_math.h"),
}
"""By package; the empty one is Python's standard library. One that an installation lacks is passed over."""


def documents(known: Iterable[Document]) -> list[Document]:
    """The foreign files, without those that the dataset has as well.

    Args:
        known: the dataset's files, train and test.
    """
    digests = {_digest(document.text) for document in known}
    found = []
    for package, files in _FILES.items():
        if (folder := _folder(package)) is None:
            continue
        for name in files:
            if not (folder / name).is_file():
                continue
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if _digest(text) not in digests:
                found.append(Document(f"{package or 'lib'}/{name}", package or "python", text))
    return found


def _folder(package: str) -> Path | None:
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
