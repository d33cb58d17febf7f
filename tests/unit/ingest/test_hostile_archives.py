"""The hostile corpus: each case comes to what it should, in bounded memory, and nothing is written anywhere."""

from __future__ import annotations

import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.errors import CodegraftError
from services.ingest.files import LFS_HEADER, FoundFile, Skipped, plain_path
from services.ingest.limits import Limits, Meter
from services.ingest.sources import archive
from tests.hostile import archives
from tests.hostile.fuzz import fuzz, mutated

MiB = 1 << 20
CASES = {case.name: case for case in archives.corpus()}
ALLOWED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MEMORY = 256 * MiB
"""What the issue of bombs allows a whole service."""


@pytest.mark.parametrize("name", CASES)
def test_each_case(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = tmp_path / "archive"
    path.write_bytes(case.data)
    kept, skipped, refused = set(), set(), ""
    try:
        for entry in archive.read(path, "", Meter(Limits(ratio_free_bytes=MiB))):
            if isinstance(entry, FoundFile):
                kept.add(entry.path)
            elif isinstance(entry, Skipped):
                skipped.add(entry.why)
    except CodegraftError as error:
        refused = error.reason
        assert error.hint
        assert case.says in error.message
    assert refused == case.refused
    if not refused:
        assert (kept, skipped) == (case.kept, case.skipped)
    assert [item.name for item in tmp_path.iterdir()] == ["archive"]


READ = """
import re, sys
from pathlib import Path
from services.core.errors import LimitExceeded
from services.ingest.limits import Limits, Meter
from services.ingest.sources import archive
try:
    for entry in archive.read(Path(sys.argv[1]), "", Meter(Limits())): pass
    print("read")
except LimitExceeded:
    print("stopped")
# ru_maxrss would also count what the parent had at the fork
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.parametrize("name", [name for name in CASES if "bomb" in name or "65,000" in name])
def test_bombs_stay_within_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "archive"
    path.write_bytes(CASES[name].data)
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True, timeout=120)
    outcome, peak = done.stdout.split()
    assert outcome == ("stopped" if CASES[name].refused else "read")
    assert int(peak) < MEMORY


names = st.lists(
    st.text(st.characters(categories=("L", "N"), include_characters="_- "), min_size=1, max_size=20),
    min_size=1,
    max_size=4,
).map("/".join)
contents = st.dictionaries(names, st.binary(max_size=2000), max_size=8)


@settings(max_examples=60, suppress_health_check=ALLOWED)
@given(files=contents, form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_what_tarfile_packs_is_read_back(tmp_path: Path, files: dict[str, bytes], form: int) -> None:
    path = tmp_path / "archive"
    path.write_bytes(archives.tar_of(*(archives.regular(name, data) for name, data in files.items()), form=form))
    assert _files(path) == _safe(files)


@settings(max_examples=60, suppress_health_check=ALLOWED)
@given(files=contents, method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_what_zipfile_packs_is_read_back(tmp_path: Path, files: dict[str, bytes], method: int) -> None:
    path = tmp_path / "archive"
    path.write_bytes(archives.zip_of(files, method))
    assert _files(path) == _safe(files)


@settings(max_examples=150, suppress_health_check=ALLOWED)
@given(
    name=st.sampled_from([name for name, case in CASES.items() if len(case.data) < 64 << 10]),
    seed=st.integers(0, 2**32),
)
def test_any_mutation_is_read_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    """A domain error or safe files, never anything else."""
    path = tmp_path / "archive"
    path.write_bytes(mutated(CASES[name].data, random.Random(seed), [CASES[name].data]))
    try:
        read = _files(path)
    except CodegraftError:
        return
    assert all(plain_path(found, Limits()) == found for found in read)


def test_the_fuzzer_reaches_every_reader(tmp_path: Path) -> None:
    outcomes = fuzz(400, seed=7, folder=tmp_path)
    assert sum(outcomes.values()) == 400
    assert {outcome.split(":")[0] for outcome in outcomes} == {
        *("archive", "path", "git_url", "ref", "url", "known_hosts")
    }
    assert outcomes["archive: read"] and outcomes["archive: BROKEN_ARCHIVE"]


def _files(path: Path) -> dict[str, bytes]:
    limits = Limits(max_total_bytes=64 * MiB)
    return {entry.path: entry.data for entry in archive.read(path, "", Meter(limits)) if isinstance(entry, FoundFile)}


def _safe(files: dict[str, bytes]) -> dict[str, bytes]:
    """What is to be read: safe paths, and no pointers of Git LFS (hypothesis finds their header in our source)."""
    return {
        name: data
        for name, data in files.items()
        if plain_path(name, Limits()) == name and not data.startswith(LFS_HEADER)
    }
