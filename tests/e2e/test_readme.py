"""The README's Python example, as it stands there, against a real stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODEGRAFT = [sys.executable, "-m", "services.cli.main"]


def example() -> str:
    found = re.search(r"<!-- CI runs this example.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def test_it_is_short() -> None:
    assert len(example().strip().splitlines()) <= 18


@pytest.mark.timeout(600)
def test_it_runs(tmp_path: Path) -> None:
    spec = find_spec("minio")
    assert spec and spec.origin
    with tarfile.open(tmp_path / "lib.tar.gz", "w:gz") as archive:
        for name in ("time.py", "tagging.py", "retention.py", "legalhold.py", "error.py"):
            archive.add(Path(spec.origin).parent / name, name)
    data = str(tmp_path / "data")
    # One optimizer step is enough to walk the path; the example itself leaves everything to the plan.
    limits = {"CODEGRAFT_TRAINER_TIME_LIMIT_SECONDS": "3"}
    up = subprocess.run(
        [*CODEGRAFT, "up", "--detach", "--data", data], env={**os.environ, **limits}, timeout=120, check=False
    )
    assert up.returncode == 0
    try:
        done = subprocess.run(
            [sys.executable, "-c", example()],
            cwd=tmp_path,
            env={**os.environ, "CODEGRAFT_DATA": data},
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )
    finally:
        subprocess.run([*CODEGRAFT, "down", "--data", data], check=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test loss") >= 2, done.stdout
