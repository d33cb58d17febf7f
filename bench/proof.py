"""The proof on real code: an adapter with AUTO settings on the source of installed packages, against the base model.

    python -m bench.proof PACKAGE [PACKAGE ...] [--steps N] [--seconds S] [--places N] [--threads T] [--sweep]

One run for each package, with a fifth of its files (by hash of their path) held out. It goes through the trainer's own
domain code, without NATS, store or scan. With --sweep four more runs without time limit and proof: half and double its
learning rate, half and double its steps; of each the version that would be published counts. Give it no time limit
then: of runs that are cut short the longest is always the best.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.run_event_pb2 import Proof
from services.core.models import catalogue
from services.trainer import job, judging, loop
from services.trainer.config import TrainerSettings
from services.trainer.planning.settings import Settings
from services.trainer.story import Evaluated, Proved, StepDone

COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("text", pa.large_string()),
        ("tokens", pa.int64()),
        ("loss", pa.float64()),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE", help="an installed package, by its import name")
    parser.add_argument("--steps", type=int, help="train so many steps instead of AUTO's")
    parser.add_argument("--seconds", type=float, help="time limit of each run; AUTO plans within it")
    parser.add_argument("--places", type=int, help="held-out lines to write, instead of AUTO's number")
    parser.add_argument("--sweep", action="store_true", help="compare AUTO with four neighbours")
    parser.add_argument("--threads", type=int, default=0, help="of training; 1 on a machine with other work")
    asked = parser.parse_args()
    for package in asked.packages:
        requested = Hyperparameters(
            train_steps=asked.steps, time_limit_seconds=asked.seconds, proof_places=asked.places
        )
        settings, loss = run(package, requested, asked.threads)
        if asked.sweep:
            sweep(package, settings, loss, asked.threads)


def sweep(package: str, auto: Settings, loss: float, threads: int) -> None:
    """Trains with four neighbours of AUTO's settings, without a time limit, and prints how AUTO's loss stands."""
    losses = {(1.0, 1.0): loss}
    for rate, length in ((0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)):
        changed = auto.to_proto()
        changed.ClearField("time_limit_seconds")
        changed.proof_places = 0
        changed.learning_rate *= rate
        changed.train_steps, changed.warmup_steps = round(auto.train_steps * length), round(auto.warmup_steps * length)
        changed.decay_steps = max(1, changed.train_steps - changed.warmup_steps)
        changed.eval_steps = max(1, round(auto.eval_steps * length))
        _, losses[rate, length] = run(package, changed, threads)
    print("| learning rate | steps | test loss of the best |\n|---|---|---|")
    for (rate, length), loss in losses.items():
        print(f"| {auto.learning_rate * rate:g} | {round(auto.train_steps * length)} | {loss:.4f} |")
    over = 100 * (losses[1.0, 1.0] / min(losses.values()) - 1)
    print(f"\nAUTO is {over:.1f} % above the best (asked: 2 %)\n", flush=True)


def run(package: str, requested: Hyperparameters, threads: int) -> tuple[Settings, float]:
    """Trains on one package and prints what came of it; gives the settings and the test loss of what is published."""
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        return _run(package, requested, Path(folder), threads)


def _run(package: str, requested: Hyperparameters, folder: Path, threads: int) -> tuple[Settings, float]:
    train, test = split(package, folder)
    began = time.monotonic()
    loaded = job.load(
        catalogue.find(""),
        TrainerSettings(trainer_threads=threads),
        requested,
        train,
        test,
        device="auto",
        planned=None,
        resume=None,
        initial=None,
        is_cancelled=lambda: False,
    )
    plan, settings = loaded.plan, loaded.settings
    print(
        f"## {package}: {plan.train_tokens:,} tokens to train, {plan.test_tokens:,} held out\n\n"
        f"{settings.train_steps} steps of {settings.batch_size} x {settings.context_length} tokens "
        f"({plan.epochs:.1f} passes), learning rate {settings.learning_rate:g}, loaded in "
        f"{time.monotonic() - began:.0f} s\n",
        flush=True,
    )
    seconds = {StepDone: 0.0, Evaluated: 0.0, Proved: 0.0}
    began = time.monotonic()
    story = loop.train(
        loaded.trainee,
        loaded.optimizer,
        settings,
        loaded.corpus,
        loaded.held_out,
        loaded.state,
        lambda: False,
        exam=loaded.exam,
    )
    proof: Proof | None = None
    for event in story:
        match event:
            case StepDone():
                seconds[StepDone] += event.seconds
            case Evaluated():
                seconds[Evaluated] += event.seconds
                foreign = "" if event.foreign_loss is None else f", foreign {event.foreign_loss:.4f}"
                found = f"step {event.step}: test loss {event.test.loss:.4f}{foreign} ({event.seconds:.1f} s)"
                print(found, event.refused, flush=True)
            case Proved(proof):
                seconds[Proved] = proof.seconds
    total = time.monotonic() - began
    if proof is None:
        print(judging.nothing_best(loaded.state, "the base model"))
    else:
        tell(proof)
    trained = seconds[StepDone]
    evaluated = seconds[Evaluated] + loaded.state.proof_seconds + seconds[Proved]
    print(
        f"\n{total:.0f} s (planned {plan.estimated_seconds:.0f}): {trained:.0f} s training, {evaluated:.0f} s "
        f"evaluation ({100 * evaluated / total:.0f} %), {seconds[Proved]:.0f} s of it the adapter's lines; "
        f"{loaded.state.step} steps, ended: {loaded.state.ended}\n",
        flush=True,
    )
    return settings, loaded.state.best_loss or 0.0


def tell(proof: Proof) -> None:
    """The table of a proof, in Markdown."""
    print("\n| | base | adapter | p |\n|---|---|---|---|")
    for name, field, p in (
        ("test loss", "test_loss", "test_loss_p"),
        ("foreign loss", "foreign_loss", ""),
        ("next line, exact match", "next_line_exact_match", ""),
        ("next line, edit similarity", "next_line_edit_similarity", "next_line_p"),
        ("filled-in line, exact match", "fim_exact_match", ""),
        ("filled-in line, edit similarity", "fim_edit_similarity", "fim_p"),
    ):
        if field == "test_loss" or proof.base.HasField(field):
            before, after = getattr(proof.base, field), getattr(proof.adapter, field)
            chance = f"{getattr(proof, p):.4f}" if p and proof.HasField(p) else ""
            print(f"| {name} | {before:.4f} | {after:.4f} | {chance} |")
    places = f"{proof.next_line_places} + {proof.fim_places} places"
    print(f"\n{proof.test_files} test files, {places}: {proof.verdict}")


def split(package: str, folder: Path) -> tuple[Path, Path]:
    """The package's Python files as the train and the test part of a dataset."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is no installed package")
    root = Path(spec.submodule_search_locations[0])
    rows = []
    for file in root.rglob("*.py"):
        path, text = str(file.relative_to(root.parent)), file.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            rows.append({"path": path, "source": package, "text": text, "tokens": 0, "loss": None})
    rows.sort(key=lambda row: hashlib.sha256(str(row["path"]).encode()).digest())
    held_out = max(5, len(rows) // 5)
    for part, files in (("test", rows[:held_out]), ("train", rows[held_out:])):
        (folder / part).mkdir()
        pq.write_table(pa.Table.from_pylist(files, COLUMNS), folder / part / "0.parquet")
    return folder / "train", folder / "test"


if __name__ == "__main__":
    main()
