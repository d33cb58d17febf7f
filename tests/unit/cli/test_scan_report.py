"""A scan looked at closely: one verdict explained, languages, losses as picture and text, two scans compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import project_pb2
from codegraft.scanner.v1 import scan_pb2, verdict_pb2
from codegraft.scanner.v1.scan_pb2 import LanguageLoss, LossBin, Scan, ScanCount, ScanReport
from codegraft.scanner.v1.verdict_pb2 import Verdict

Codegraft = Callable[..., Any]
SOURCE = "projects/acme/sources/app"
ACCEPTED, DUPLICATE, HIGH_LOSS, NOT_TEXT = (
    verdict_pb2.VERDICT_REASON_ACCEPTED,
    verdict_pb2.VERDICT_REASON_DUPLICATE,
    verdict_pb2.VERDICT_REASON_HIGH_LOSS,
    verdict_pb2.VERDICT_REASON_NOT_TEXT,
)


@pytest.fixture(autouse=True)
def answers(fake: Any) -> None:
    report = ScanReport(
        file_count=5,
        reasons={"ACCEPTED": ScanCount(files=3), "HIGH_LOSS": ScanCount(files=2)},
        languages={"Python": ScanCount(files=3)},
        all_languages={"Python": ScanCount(files=4, bytes=400), "SQL": ScanCount(files=1, bytes=10)},
        losses={"Python": LanguageLoss(files=4, median=1.1, mad=0.2, threshold=3.0, rejected=1)},
        loss_bins=[LossBin(low=0.9, high=1.0, accepted=3), LossBin(low=3.2, high=3.3, rejected=1)],
        warnings=["Python loses 25 % of its files"],
    )
    scan = Scan(name="projects/acme/scans/sc-1", report=report)
    fake.answers["ListScans"] = scan_pb2.ListScansResponse(scans=[scan])
    fake.answers["GetScan"] = scan_pb2.GetScanResponse(scan=scan)
    project = project_pb2.Project(name="projects/acme", title="Acme", languages_off=["SQL"], exclude=["a/**"], etag="7")
    fake.answers["GetProject"] = project_pb2.GetProjectResponse(project=project)


def verdict(path: str, reason: Any = ACCEPTED, **fields: Any) -> Verdict:
    split = Split.SPLIT_TRAIN if reason == ACCEPTED else Split.SPLIT_UNSPECIFIED
    given = {"split": split, "reasons": [reason], "details": [""], "language": "Python", **fields}
    return Verdict(path=path, source=SOURCE, reason=reason, accepted=reason == ACCEPTED, **given)


def test_explain_tells_every_reason_and_what_was_asked(fake: Any, codegraft: Codegraft) -> None:
    one = verdict(
        "src/a [1].py",
        HIGH_LOSS,
        reasons=[DUPLICATE, HIGH_LOSS],
        details=["near-duplicate of b.py", "3.250 nats per token, over 3.000"],
        duplicate_of=f"{SOURCE}:b.py",
        similarity=0.91,
        loss=3.25,
        bits_per_byte=1.4,
        encoding="cp1252",
        license="MIT",
        tokens=100,
    )
    fake.answers["ListVerdicts"] = scan_pb2.ListVerdictsResponse(verdicts=[one, verdict("lib/src/a [1].py")])
    told = codegraft("scan", "explain", "-p", "acme", "src/a [1].py").out
    for part in (
        "rejected as DUPLICATE: near-duplicate of b.py",
        "besides HIGH_LOSS: 3.250 nats per token, over 3.000",
        "91% similar",
        "median 1.100, MAD 0.200, limit 3.000",
        "cp1252",
        "MIT",
        "3.250 nats per token, 1.400 bits per byte",
    ):
        assert part in told
    assert "lib/src" not in told
    assert fake.last("ListVerdicts").filter.path == r"/src/a\ \[1].py"
    fake.answers["ListVerdicts"] = scan_pb2.ListVerdictsResponse()
    assert codegraft("scan", "explain", "-p", "acme", "absent.py").code == 3


def test_languages_are_listed_and_switched(fake: Any, codegraft: Codegraft) -> None:
    rows = json.loads(codegraft("scan", "languages", "-p", "acme", "--json").out)
    assert [(row["language"], row["files"], row["accepted"], row["on"]) for row in rows] == [
        ("Python", 4, 3, True),
        ("SQL", 1, 0, False),
    ]
    fake.answers["UpdateProject"] = lambda request: project_pb2.UpdateProjectResponse(project=request.project)
    done = codegraft("project", "set", "acme", "--language-off", "Go", "--exclude-license", "GPL-*", "--exclude", "")
    changed = fake.last("UpdateProject").project
    assert (list(changed.languages_off), list(changed.exclude_licenses), list(changed.exclude)) == (
        ["Go"],
        ["GPL-*"],
        [],
    )
    assert (changed.title, changed.etag) == ("Acme", "7")
    assert "languages off: Go" in done.out
    assert "languages off: SQL" in codegraft("project", "show", "acme").out


def test_losses_as_text_and_as_picture(fake: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    lines = codegraft("scan", "plot", "-p", "acme").out.splitlines()
    assert lines[0].startswith("   0.9 to  1.0        3  ####") and lines[1].endswith("x" * 17)
    for suffix in ("png", "svg"):
        target = tmp_path / f"losses.{suffix}"
        assert codegraft("scan", "plot", "-p", "acme", "-o", str(target)).code == 0
        assert target.stat().st_size > 5000
    assert codegraft("scan", "plot", "-p", "acme", "-o", str(tmp_path / "no" / "x.png")).code == 4
    fake.answers["GetScan"] = scan_pb2.GetScanResponse(scan=Scan(name="projects/acme/scans/sc-1"))
    assert codegraft("scan", "plot", "-p", "acme").code == 4


def test_what_two_scans_decide_differently(fake: Any, codegraft: Codegraft) -> None:
    sides = {
        "projects/acme/scans/old": [verdict("a"), verdict("b"), verdict("d", NOT_TEXT)],
        "projects/acme/scans/new": [verdict("a"), verdict("b", HIGH_LOSS), verdict("c"), verdict("e")],
    }
    fake.answers["ListVerdicts"] = lambda request: scan_pb2.ListVerdictsResponse(verdicts=sides[request.parent])
    done = codegraft("scan", "diff", "-p", "acme", "old", "new", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["path"], row["before"], row["after"]) for row in rows] == [
        ("b", "ACCEPTED TRAIN", "HIGH_LOSS"),
        ("c", "", "ACCEPTED TRAIN"),
        ("d", "NOT_TEXT", ""),
        ("e", "", "ACCEPTED TRAIN"),
    ]
    assert "4 files differ, 1 do not" in done.err
    assert "absent" in codegraft("scan", "diff", "-p", "acme", "old", "new").out


def test_warnings_are_shown(fake: Any, codegraft: Codegraft) -> None:
    assert "Python loses 25 %" in codegraft("scan", "show", "-p", "acme").err
