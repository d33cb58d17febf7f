"""``codegraft scan explain | languages | plot | diff``: a scan's verdicts, looked at closely."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.scanner.v1.verdict_pb2 import Verdict, VerdictFilter, VerdictReason
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, out, print_json, print_table
from services.cli.plot import draw_losses
from services.client import Codegraft
from services.core import names
from services.core.errors import FailedPrecondition, NotFound, ScanNotFound

ScanId = Annotated[str, typer.Argument(metavar="[SCAN]", help="Id or full name; the newest one if left out.")]
_BAR = 50
"""Characters of the longest bar of a histogram."""


def newest_or(client: Codegraft, project: str, scan: str) -> str:
    """The scan's full name; the newest one's for an empty id."""
    if scan:
        return full_name(names.SCAN, scan, project)
    newest = next(iter(client.scans.list(project)), None)
    if newest is None:
        raise ScanNotFound(f"{project} has no scan yet", field="scan", hint=f"codegraft scan start --project {project}")
    return newest.name


def reason_word(reason: VerdictReason) -> str:
    """The reason without its prefix."""
    return VerdictReason.Name(reason).removeprefix("VERDICT_REASON_")


def explain(
    project: Project,
    path: Annotated[str, typer.Argument(help="Path of the file within its source.")],
    scan: Annotated[str, typer.Option(help="Id or full name of the scan; the newest one if left out.")] = "",
    json: Json = False,
) -> None:
    """Explain the verdict of one file: every reason, what was measured, and what was asked of it.

    Example: codegraft scan explain -p acme src/app.py
    """
    with connect() as client:
        found = client.scans.get(newest_or(client, project, scan))
        wanted = VerdictFilter(path="/" + re.sub(r"([\\*?\[ ])", r"\\\1", path.strip("/")))
        verdicts = [one for one in client.scans.verdicts(found.name, wanted) if one.path == path.strip("/")]
    if not verdicts:
        raise NotFound(
            f"{found.name} has no verdict of {path!r}",
            field="path",
            hint=f"Look for it: codegraft scan log -p {project} --path '{path.rpartition('/')[2]}'",
        )
    for verdict in verdicts:
        if json:
            print_json(verdict)
        else:
            _explain(verdict, found)


def _explain(verdict: Verdict, scan: Scan) -> None:
    out.print(f"{verdict.path} of {id_of(verdict.source)}, {verdict.size:,} bytes, sha256 {verdict.sha256}")
    if verdict.accepted:
        out.print(f"  accepted, for {Split.Name(verdict.split).removeprefix('SPLIT_').lower()}")
    for number, (reason, detail) in enumerate(zip(verdict.reasons, verdict.details, strict=False)):
        if not verdict.accepted:
            out.print(
                f"  {'rejected as' if number == 0 else 'besides'} {reason_word(reason)}: {detail or 'by its kind'}"
            )
    about = {
        "language": verdict.language or "unknown",
        "encoding": verdict.encoding or "not decoded",
        "licence": verdict.license,
        "duplicate of": verdict.duplicate_of and f"{verdict.duplicate_of} ({verdict.similarity:.0%} similar)",
    }
    if verdict.HasField("loss"):
        usual = scan.report.losses[verdict.language]
        about["loss"] = f"{verdict.loss:.3f} nats per token, {verdict.bits_per_byte:.3f} bits per byte"
        about["of its language"] = f"median {usual.median:.3f}, MAD {usual.mad:.3f}, limit {usual.threshold:.3f}"
        about["tokens"] = f"{verdict.tokens:,}, of which {verdict.sampled_tokens:,} were read"
    for name, value in about.items():
        if value:
            out.print(f"  {name + ':':18}{value}")


def languages(project: Project, scan: ScanId = "", json: Json = False) -> None:
    """List the languages of a scan with their counts, and which of them the project switches off.

    Switch one off or on: codegraft project set acme --language-off SQL
    """
    with connect() as client:
        found = client.scans.get(newest_or(client, project, scan))
        off = set(client.projects.get(project).languages_off)
    rows = [
        [language or "unknown", count.files, count.bytes, found.report.languages[language].files, language not in off]
        for language, count in sorted(found.report.all_languages.items(), key=lambda item: (-item[1].files, item[0]))
    ]
    columns = ["LANGUAGE", "FILES", "BYTES", "ACCEPTED", "ON"]
    if json:
        print_json([dict(zip(map(str.lower, columns), row, strict=True)) for row in rows])
    else:
        print_table(columns, rows, empty="the scan has no files yet")


def plot(
    project: Project,
    scan: ScanId = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image to write (.png, .svg, .pdf); text if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Show how the losses of the files lie, and what became of them: as text, or as a picture.

    Example: codegraft scan plot -p acme -o losses.svg
    """
    with connect() as client:
        found = client.scans.get(newest_or(client, project, scan))
    report = found.report
    if not report.loss_bins:
        raise FailedPrecondition(f"{found.name} has no losses", hint="Wait for its end, or run it with --loss-filter.")
    if json:
        print_json(list(report.loss_bins))
    elif output is not None:
        draw_losses(report, f"scan {id_of(found.name)}", output)
        err.print(f"wrote {output}")
    else:
        most = max(bin.accepted + bin.rejected for bin in report.loss_bins)
        for bin in report.loss_bins:
            bar = "#" * round(_BAR * bin.accepted / most) + "x" * round(_BAR * bin.rejected / most)
            out.print(f"{bin.low:6.1f} to {bin.high:4.1f} {bin.accepted + bin.rejected:8,}  {bar}")
        err.print("nats per token, files, # accepted, x rejected")


def diff(
    project: Project,
    before: Annotated[str, typer.Argument(help="Id or full name of the scan to compare with.")],
    after: Annotated[str, typer.Argument(metavar="[AFTER]", help="The other scan; the newest one if left out.")] = "",
    json: Json = False,
) -> None:
    """Show the files that two scans decide differently: another reason or split, new and gone files."""
    with connect() as client:
        left = client.scans.verdicts(newest_or(client, project, before))
        right = client.scans.verdicts(newest_or(client, project, after))
        counts = [0, 0]
        for old, new in _joined(left, right):
            was, now = _outcome(old), _outcome(new)
            counts[was == now] += 1
            if was == now:
                continue
            there = new or old
            assert there is not None
            if json:
                print_json({"source": there.source, "path": there.path, "before": was, "after": now})
            else:
                out.print(f"{was or 'absent':20} -> {now or 'absent':20} {id_of(there.source)}: {there.path}")
    err.print(f"{counts[0]:,} files differ, {counts[1]:,} do not")


def _outcome(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    split = Split.Name(verdict.split).removeprefix("SPLIT_") if verdict.accepted else ""
    return f"{reason_word(verdict.reason)} {split}".strip()


def _joined(left: Iterator[Verdict], right: Iterator[Verdict]) -> Iterator[tuple[Verdict | None, Verdict | None]]:
    """Pairs of the same file; both sides come by source and path."""

    def key(verdict: Verdict) -> tuple[str, str]:
        return verdict.source, verdict.path

    old, new = next(left, None), next(right, None)
    while old is not None or new is not None:
        if new is None or (old is not None and key(old) < key(new)):
            yield old, None
            old = next(left, None)
        elif old is None or key(new) < key(old):
            yield None, new
            new = next(right, None)
        else:
            yield old, new
            old, new = next(left, None), next(right, None)
