"""``codegraft scan``: a verdict for every file, and the dataset of the accepted ones."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from codegraft.common.v1.job_pb2 import JobState
from codegraft.scanner.v1 import scan_pb2
from codegraft.scanner.v1.verdict_pb2 import Verdict, VerdictFilter, VerdictReason
from services.cli import dry_run, scan_report
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.dry_run import Secrets
from services.cli.output import Follow, Json, err, out, print_changes, print_json, print_table
from services.cli.progress import JobBar
from services.cli.scan_report import ScanId, newest_or, reason_word
from services.client import Codegraft
from services.client.jobs import raise_failure
from services.client.words import state_word
from services.core import names

app = typer.Typer(help="Scans: which files are worth training on, and why the others are not.", no_args_is_help=True)


@app.command()
def start(
    project: Project,
    snapshot: Annotated[str, typer.Option(help="Snapshot to scan; a new one of all sources if left out.")] = "",
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to reject, in .gitignore syntax.")] = None,
    force_include: Annotated[
        list[str] | None, typer.Option(help="Mask of files that masks and the loss cannot reject.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language to use; every one if left out.")] = None,
    max_file_bytes: Annotated[int | None, typer.Option(help="Largest accepted file.")] = None,
    max_digit_share: Annotated[float | None, typer.Option(help="Largest accepted share of digits.")] = None,
    loss_filter: Annotated[bool | None, typer.Option("--loss-filter/--no-loss-filter", help="Run stage 2.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Largest accepted loss, nats per token.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of an accepted file.")] = None,
    max_tokens_per_file: Annotated[int | None, typer.Option(help="Most tokens that stage 2 reads of a file.")] = None,
    window_tokens: Annotated[int | None, typer.Option(help="Tokens of a window of stage 2.")] = None,
    test_share: Annotated[float | None, typer.Option(help="Share of the AUTO files held out as test files.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the automatic split.")] = None,
    model: Annotated[str, typer.Option(help="Base model whose loss is measured.")] = "",
    language_off: Annotated[list[str] | None, typer.Option(help="Language to leave out.")] = None,
    exclude_license: Annotated[
        list[str] | None, typer.Option(help="Licence to leave out, by SPDX id; * for anything: 'GPL-*'.")
    ] = None,
    reject_vendored: Annotated[
        bool | None, typer.Option("--reject-vendored/--no-reject-vendored", help="Reject other people's code.")
    ] = None,
    reject_generated: Annotated[
        bool | None, typer.Option("--reject-generated/--no-reject-generated", help="Reject what programs wrote.")
    ] = None,
    near_duplicates: Annotated[
        bool | None, typer.Option("--near-duplicates/--no-near-duplicates", help="Reject near-duplicates.")
    ] = None,
    near_threshold: Annotated[float | None, typer.Option(help="Least similarity of near-duplicates.")] = None,
    secrets: Annotated[Secrets | None, typer.Option(help="What happens to files with secrets.")] = None,
    loss_mad: Annotated[
        float | None, typer.Option(help="Reject over median + this * MAD of each language, not over --max-loss.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Wait for the end and show the result.")] = False,
    json: Json = False,
) -> None:
    """Take a snapshot of the sources and scan it.

    Stage 1 rejects by rules (language, binary, size, digits, masks, duplicates); stage 2 by the loss under the base
    model. Settings left out take the service's defaults.

    Example: codegraft scan start -p acme --exclude 'migrations/**' --watch
    """
    settings = scan_pb2.ScanSettings(
        exclude=exclude or (),
        force_include=force_include or (),
        languages=language or (),
        max_file_bytes=max_file_bytes,
        max_digit_share=max_digit_share,
        loss_filter=loss_filter,
        max_loss=max_loss,
        min_tokens=min_tokens,
        max_tokens_per_file=max_tokens_per_file,
        window_tokens=window_tokens,
        test_share=test_share,
        seed=seed,
        model=model,
        languages_off=language_off or (),
        exclude_licenses=exclude_license or (),
        reject_vendored=reject_vendored,
        reject_generated=reject_generated,
        near_duplicates=near_duplicates,
        near_threshold=near_threshold,
        secrets=f"SECRET_POLICY_{secrets.name}" if secrets else None,
        loss_mad=loss_mad,
    )
    with connect() as client:
        taken = full_name(names.SNAPSHOT, snapshot, project) if snapshot else client.snapshots.create(project).name
        scan = client.scans.create(project, taken, settings=settings)
        if watch:
            scan = _follow(client, scan.name)
    if json:
        print_json(scan)
    elif watch:
        _tell(scan)
    else:
        err.print(f"queued {scan.name}; see: codegraft scan show --project {project}")
    raise_failure(scan.status, scan.name)


def _follow(client: Codegraft, name: str) -> scan_pb2.Scan:
    scan = None
    with JobBar(f"scan {id_of(name)}") as bar:
        for scan in client.scans.watch(name):
            bar.show(scan.status)
    return scan or client.scans.get(name)


@app.command("list")
def list_(project: Project, follow: Follow = False, json: Json = False) -> None:
    """List the scans of a project, newest first; with --follow each of them, then every change, a line each."""
    with connect() as client:
        if follow:
            print_changes(client.scans.watch_all(project), _change, as_json=json)
            return
        scans = list(client.scans.list(project))
    if json:
        print_json(scans)
        return
    columns = ["SCAN", "STATE", "FILES", "ACCEPTED", "REJECTED", "DATASET"]
    print_table(columns, map(_row, scans), empty=f"no scan yet: codegraft scan start --project {project}")


def _row(scan: scan_pb2.Scan) -> list[object]:
    return [
        id_of(scan.name),
        state_word(scan.status.state),
        scan.report.file_count,
        scan.report.accepted_count,
        scan.report.rejected_count,
        id_of(scan.dataset),
    ]


def _change(message: scan_pb2.WatchScansResponse) -> list[object]:
    return _row(message.scan) if message.HasField("scan") else [id_of(message.removed), "removed"]


@app.command()
def show(project: Project, scan: ScanId = "", json: Json = False) -> None:
    """Show a scan: its state, and its files by reason."""
    with connect() as client:
        found = client.scans.get(newest_or(client, project, scan))
    if json:
        print_json(found)
    else:
        _tell(found)


@app.command()
def log(
    project: Project,
    scan: ScanId = "",
    accepted: Annotated[bool, typer.Option("--accepted", help="Only accepted files.")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Only rejected files.")] = False,
    reason: Annotated[list[str] | None, typer.Option(help="Only this reason, for example LOTS_OF_DIGITS.")] = None,
    path: Annotated[str, typer.Option(help="Only paths that match this .gitignore pattern.")] = "",
    language: Annotated[list[str] | None, typer.Option(help="Only this language.")] = None,
    min_loss: Annotated[float | None, typer.Option(help="Only losses of at least this, nats per token.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Only losses of at most this.")] = None,
    json: Json = False,
) -> None:
    """Print the verdict of every file: one line each; with --json one JSON object a line.

    Example: codegraft scan log -p acme --rejected --language Python --min-loss 2.5
    """
    if accepted and rejected:
        raise typer.BadParameter("give --accepted or --rejected, not both; neither prints all")
    wanted = VerdictFilter(
        accepted=True if accepted else False if rejected else None,
        reasons=[_reason(name) for name in reason or ()],
        path=path,
        languages=language or (),
        min_loss=min_loss,
        max_loss=max_loss,
    )
    with connect() as client:
        for verdict in client.scans.verdicts(newest_or(client, project, scan), wanted):
            if json:
                print_json(verdict)
            else:
                out.print(_line(verdict))


app.command()(scan_report.explain)
app.command()(scan_report.languages)
app.command()(scan_report.plot)
app.command()(scan_report.diff)
app.command("dry-run")(dry_run.dry_run)


def _reason(name: str) -> str:
    """The enum's full name."""
    full = f"VERDICT_REASON_{name.upper().replace('-', '_')}"
    if full not in VerdictReason.keys()[1:]:
        known = ", ".join(known.removeprefix("VERDICT_REASON_") for known in VerdictReason.keys()[1:])
        raise typer.BadParameter(f"{name!r} is no reason; there are {known}")
    return full


def _line(verdict: Verdict) -> str:
    reason = reason_word(verdict.reason)
    loss = f"loss {verdict.loss:.3f}" if verdict.HasField("loss") else ""
    notes = ", ".join(filter(None, [verdict.detail, loss]))
    return f"{reason:17} {id_of(verdict.source)}: {verdict.path}" + (f"  ({notes})" if notes else "")


def _tell(scan: scan_pb2.Scan) -> None:
    err.print(f"{scan.name}: {state_word(scan.status.state)}")
    report = scan.report
    if not report.file_count:
        return
    rows = [
        [reason, count.files, count.bytes, count.tokens or None]
        for reason, count in sorted(report.reasons.items(), key=lambda item: (item[0] != "ACCEPTED", -item[1].files))
    ]
    print_table(["REASON", "FILES", "BYTES", "TOKENS"], rows, empty="")
    err.print(
        f"{report.accepted_count:,} of {report.file_count:,} files accepted: {report.train.files:,} to train on "
        f"({report.train.tokens:,} tokens), {report.test.files:,} held out ({report.test.tokens:,} tokens)"
    )
    for warning in report.warnings:
        err.print(Text.assemble(("warning: ", "bold yellow"), warning))
    if scan.status.state == JobState.JOB_STATE_SUCCEEDED:
        err.print(f"dataset {scan.dataset}")
