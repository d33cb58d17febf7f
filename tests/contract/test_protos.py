"""The contract documents itself: every RPC lists its errors, and every listed reason is in the error table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from services.core import errors

ROOT = Path(__file__).parents[2]
REASONS = {error.reason for error in errors.all_errors()}


def buf() -> str:
    found = shutil.which("buf", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert found, "buf is part of the dev extra"
    return found


def rpcs() -> list[tuple[str, str]]:
    """(full RPC name, its leading comment) of every service, from the sources."""
    image = subprocess.run([buf(), "build", "-o", "-#format=binpb"], cwd=ROOT, check=True, capture_output=True).stdout
    found = []
    for file in descriptor_pb2.FileDescriptorSet.FromString(image).file:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for s, service in enumerate(file.service):
            for m, method in enumerate(service.method):
                found.append((f"{file.package}.{service.name}.{method.name}", comments.get((6, s, 2, m), "")))
    return found


RPCS = rpcs()
FOUR = ("ingest", "scanner", "trainer", "inference")


def test_all_four_services_are_in_the_contract() -> None:
    packages = {name.rsplit(".", 2)[0] for name, _ in RPCS}
    assert packages == {
        f"codegraft.{service}.v1" for service in ("ingest", "scanner", "trainer", "inference", "access")
    }


@pytest.mark.parametrize(("rpc", "comment"), RPCS, ids=[name for name, _ in RPCS])
def test_rpc_documents_its_errors(rpc: str, comment: str) -> None:
    listed = re.search(r"Errors: ([A-Z_,\s]+)\.", comment)
    assert listed, f"{rpc} has no line 'Errors: REASON, REASON.' in its comment"
    unknown = {reason for reason in re.split(r"[,\s]+", listed[1]) if reason} - REASONS
    assert not unknown, f"{rpc} names reasons that services/core/errors.py does not have: {unknown}"
