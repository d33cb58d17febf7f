"""The demo, phase by phase."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from codegraft.inference.v1.completion_pb2 import AdapterChoice
from codegraft.inference.v1.serving_pb2 import SERVING_MODE_LATEST_BEST
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from codegraft.scanner.v1.verdict_pb2 import VerdictFilter, VerdictReason
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.cli.bundle import make_bundle
from services.cli.connect import id_of
from services.cli.demo import editor, report
from services.cli.demo.editor import Editor, Swap
from services.cli.demo.house import heed_signals, started
from services.cli.demo.material import HELD_OUT, Package, find_package
from services.cli.demo.report import Figures
from services.cli.output import ExitCode, print_table
from services.cli.plot import curves, draw
from services.cli.progress import JobBar
from services.client import Codegraft
from services.client.jobs import raise_failure
from services.client.story import sentence
from services.core import places
from services.core.errors import FailedPrecondition
from services.core.places import Place, Score

PROJECT = "demo"
SAMPLED_TOKENS = 256
"""Tokens per file that stage 2 of the scan reads: enough to tell code from noise, and soon done on two cores."""
LEFT_OUT = ("test/", "tests/")
"""Masks. Tests are two fifths of many repositories, and the demo waits for every token that stage 2 reads."""
HELD_OUT_SHARE = 0.2
"""Of the archive's files: these and the marked one measure the adapter."""
PLACES = 30
AT_ONCE = 4
"""Places that are completed at once."""


def demo(
    repo: Annotated[str, typer.Option(help="Git repository: a path (travels as a bundle) or a URL.")] = ".",
    train_seconds: Annotated[float, typer.Option(min=20, help="Time limit of the training.")] = 180,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture of the loss curves.")] = Path("loss.png"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the closing figures as JSON, too.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data folder to use and keep.", show_default="a temporary one")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running at the end, to look at.")] = False,
) -> None:
    """Run the main job on this machine: repository -> scan -> train -> swap under a running stream -> completions.

    It starts a stack of its own, takes a git repository without its tests and an installed package (minio-py), and ends
    everything it started, also on Ctrl-C. With --keep the stack outlives it, unless it fails: look around in the
    console, ask for completions, then stop it as it says at the end.

    Examples: codegraft demo

    codegraft demo --repo https://example.com/team/app.git --json figures.json

    codegraft demo --keep
    """
    began = time.monotonic()
    heed_signals()
    package = find_package()
    folder, is_kept = data or Path(tempfile.mkdtemp(prefix="codegraft-demo-")), data is not None
    figures = Figures()
    try:
        with figures.phase("start"), contextlib.ExitStack() as stack:
            house = stack.enter_context(started(folder, keep=keep))
            client = house.client
            running = stack.pop_all()
        with running:
            with figures.phase("ingest"):
                snapshot = _ingest(client, repo, package, folder)
            with figures.phase("scan"):
                scan = _scan(client, snapshot)
            with figures.phase("train and swap"):
                events, swap = _train(client, scan, train_seconds)
            with figures.phase("complete"):
                _complete(client, scan, package, figures)
            draw(curves(events), "codegraft demo", output)
            figures.add_run(events, swap)
        is_kept = is_kept or keep
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
    figures.seconds["total"] = time.monotonic() - began
    report.show(figures, output)
    house.tell(keep=keep)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(figures), indent=2) + "\n")
    if swap.broken:
        raise typer.Exit(ExitCode.FAILED)


def _ingest(client: Codegraft, repo: str, package: Package, folder: Path) -> str:
    """Name of the snapshot of a repository, an archive and one held-out file.

    All held-out files are the package's: the same in every demo, so that its figures can be compared.
    """
    client.projects.create(PROJECT)
    added: list[Source] = []
    if Path(repo).exists():
        make_bundle(Path(repo), folder / "repository.bundle")
        bundle = folder / "repository.bundle"
        added.append(client.sources.add_bundle(PROJECT, bundle, source_id="repository", split=Split.SPLIT_TRAIN))
    else:
        added.append(client.sources.add_git(PROJECT, repo, source_id="repository", split=Split.SPLIT_TRAIN))
    package.pack(folder / "minio.tar.gz")
    added.append(client.sources.add_archive(PROJECT, folder / "minio.tar.gz", source_id="minio"))
    added.append(
        client.sources.add_file(PROJECT, package.held_out, path=HELD_OUT, source_id="held-out", split=Split.SPLIT_TEST)
    )
    ready = [client.sources.wait(source.name) for source in added]
    rows = [
        [id_of(source.name), source.WhichOneof("origin"), source.file_count, source.byte_count, source.commit[:12]]
        for source in ready
    ]
    print_table(["SOURCE", "KIND", "FILES", "BYTES", "COMMIT"], rows, empty="")
    return client.snapshots.create(PROJECT).name


def _scan(client: Codegraft, snapshot: str) -> Scan:
    settings = ScanSettings(
        max_tokens_per_file=SAMPLED_TOKENS,
        window_tokens=SAMPLED_TOKENS,
        test_share=HELD_OUT_SHARE,
        exclude=LEFT_OUT,
    )
    scan = created = client.scans.create(PROJECT, snapshot, settings)
    with JobBar("scan") as bar:
        for scan in client.scans.watch(created.name):
            bar.show(scan.status)
    raise_failure(scan.status, scan.name)
    rows = sorted(scan.report.reasons.items(), key=lambda item: -item[1].files)
    print_table(["REASON", "FILES", "BYTES"], [[reason, count.files, count.bytes] for reason, count in rows], empty="")
    rejected = list(client.scans.verdicts(scan.name, VerdictFilter(accepted=False)))[:6]
    print_table(
        ["REJECTED, FOR EXAMPLE", "REASON", "DETAIL"],
        [[verdict.path, _reason(verdict.reason), verdict.detail[:60]] for verdict in rejected],
        empty="nothing was rejected",
    )
    return scan


def _reason(value: VerdictReason) -> str:
    return VerdictReason.Name(value).removeprefix("VERDICT_REASON_")


def _train(client: Codegraft, scan: Scan, seconds: float) -> tuple[list[RunEvent], Swap]:
    """The run's story, and what became of the streams that were open when its first best version was swapped in."""
    client.serving.set(PROJECT, SERVING_MODE_LATEST_BEST)
    for _ in client.completions.complete(PROJECT, prefix="import ", path="a.py", max_tokens=1):
        pass  # the model is loaded from here on
    settings = Hyperparameters(time_limit_seconds=seconds, seed=1)
    run = client.runs.create(PROJECT, settings, dataset=scan.dataset, title="demo")
    typing = Editor(client, PROJECT)
    swap: Swap | None = None
    events: list[RunEvent] = []
    with JobBar("train") as bar:
        first_evaluation = 0
        for message in client.runs.watch(run.name):
            run = message.run
            bar.show(run.status)
            if not message.HasField("event"):
                continue
            event = message.event
            events.append(event)
            if line := sentence(event):
                bar.tell(line)
            if event.HasField("plan"):
                first_evaluation = event.plan.hyperparameters.eval_steps
            # The editor types around the first evaluation, which publishes the first best version; a time limit may
            # bring that forward.
            is_near = event.HasField("step") and event.step.step >= first_evaluation - 1
            if (is_near or event.HasField("best")) and not typing.streams:
                typing.start()
            if event.HasField("best") and swap is None:
                swap = _watch_swap(client, event, typing)
                bar.tell(
                    f"swapped in under {swap.over_the_swap} running stream(s), "
                    f"{swap.streams} streams, {swap.broken} broken"
                )
    if typing.streams and swap is None:
        typing.stop()
    raise_failure(run.status, run.name)
    if swap is None:
        raise FailedPrecondition(
            "no checkpoint beat the base model, so there is nothing to swap in",
            hint="Train longer: --train-seconds 300.",
        )
    _await_served(client, run.best_checkpoint)
    return events, swap


def _watch_swap(client: Codegraft, best: RunEvent, typing: Editor) -> Swap:
    """Waits until the version serves and a stream has begun on it, then lets the editor rest."""
    _await_served(client, best.best.name)
    served = time.time()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(stream.sha256 == best.best.sha256 and stream.first_token for stream in list(typing.streams)):
            break
        time.sleep(0.02)
    typing.stop()
    return editor.look_back(typing.streams, best.best.sha256, best.time.ToNanoseconds() / 1e9, served)


def _await_served(client: Codegraft, checkpoint: str) -> None:
    """Returns when the replica serves that checkpoint, or a newer best one."""
    step = int(checkpoint.rsplit("/", 1)[1])
    for message in client.serving.watch(PROJECT):
        active = message.status.active_checkpoint
        if active and int(active.rsplit("/", 1)[1]) >= step:
            return
        if message.status.HasField("failure"):
            raise FailedPrecondition(f"the adapter was refused: {message.status.failure.message}")


def _complete(client: Codegraft, scan: Scan, package: Package, figures: Figures) -> None:
    """Completes held-out places with the base model and with the adapter, and shows some side by side."""
    held_out = [
        verdict
        for verdict in client.scans.verdicts(scan.name, VerdictFilter(accepted=True))
        if verdict.split == Split.SPLIT_TEST and not verdict.source.endswith("/repository")
    ]
    chosen = places.choose([(verdict.path, package.text(verdict.path)) for verdict in held_out], PLACES)
    base = _lines(client, chosen, AdapterChoice(base=True))
    adapted = _lines(client, chosen, AdapterChoice())
    figures.base, figures.adapter, figures.places = (
        Score.of(places.similarities(base, chosen)),
        Score.of(places.similarities(adapted, chosen)),
        len(chosen),
    )
    report.show_examples(chosen, base, adapted)


def _lines(client: Codegraft, chosen: list[Place], adapter: AdapterChoice) -> list[str]:
    def line(place: Place) -> str:
        pieces = client.completions.complete(
            PROJECT,
            prefix=place.prefix,
            suffix=place.suffix,
            path=place.path,
            max_tokens=40,
            single_line=True,
            adapter=adapter,
        )
        return "".join(piece.text for piece in pieces)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(line, chosen))
