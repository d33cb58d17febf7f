"""``codegraft train``: runs that fine-tune a LoRA adapter on a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from codegraft.common.v1.job_pb2 import JobState
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run, WatchRunsResponse
from services.cli import tensorboard
from services.cli.connect import Project, checkpoint_name, connect, full_name, id_of
from services.cli.output import Follow, Json, err, print_changes, print_json, print_table
from services.cli.plot import curves, draw
from services.cli.progress import JobBar
from services.client import Codegraft
from services.client.jobs import raise_failure
from services.client.proof import proof_rows
from services.client.story import sentence
from services.client.words import duration, state_word
from services.core import names
from services.core.errors import FailedPrecondition

app = typer.Typer(help="Training: LoRA adapters of a base model, judged on held-out files.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(metavar="[RUN]", help="Id or full name; the newest one if left out.")]
LATEST = "latest"


class Switch(StrEnum):
    """A setting that is on, off, or (left out) chosen for the caller."""

    ON = "on"
    OFF = "off"


def _setting(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=text, rich_help_panel="Settings (each one left out is chosen for you)"
    )
    return option


@app.command()
def start(
    project: Project,
    dataset: Annotated[str, typer.Option(help="Dataset to train on; the newest one if left out.")] = "",
    model: Annotated[str, typer.Option(help="Base model; see `codegraft models`.")] = "",
    title: Annotated[str, typer.Option(help="Title for people.")] = "",
    lora_r: Annotated[int | None, _setting("Rank of the adapter.")] = None,
    lora_alpha: Annotated[float | None, _setting("Scale: the update counts alpha / r.")] = None,
    lora_init_scale: Annotated[float | None, _setting("L2 norm of the rows of lora_A at the start.")] = None,
    lora_dropout: Annotated[float | None, _setting("Dropout on the adapter's input.")] = None,
    target_module: Annotated[list[str] | None, _setting("Linear layer to adapt (repeat for more).")] = None,
    learning_rate: Annotated[float | None, _setting("Peak learning rate.")] = None,
    batch_size: Annotated[int | None, _setting("Sequences per optimizer step.")] = None,
    micro_batch_size: Annotated[int | None, _setting("Sequences per forward pass.")] = None,
    warmup_steps: Annotated[int | None, _setting("Steps until the peak learning rate.")] = None,
    weight_decay: Annotated[float | None, _setting("Decoupled weight decay.")] = None,
    train_steps: Annotated[int | None, _setting("Optimizer steps in all.")] = None,
    decay_steps: Annotated[int | None, _setting("Steps over which the learning rate falls.")] = None,
    low_gpu_memory_mode: Annotated[Switch | None, _setting("Gradient checkpointing: less memory, more time.")] = None,
    context_length: Annotated[int | None, _setting("Tokens per sequence.")] = None,
    fim_rate: Annotated[float | None, _setting("Share of documents with a middle to fill in, 0 to 1.")] = None,
    seed: Annotated[int | None, _setting("Seed.")] = None,
    time_limit_seconds: Annotated[float | None, _setting("End after this long, with a last evaluation.")] = None,
    early_stopping_patience: Annotated[int | None, _setting("End after so many evaluations without a best.")] = None,
    eval_steps: Annotated[int | None, _setting("Steps between evaluations.")] = None,
    checkpoint_steps: Annotated[int | None, _setting("Steps between checkpoints.")] = None,
    max_eval_tokens: Annotated[int | None, _setting("Most tokens of the test set that are evaluated.")] = None,
    max_grad_norm: Annotated[float | None, _setting("Largest gradient norm before clipping.")] = None,
    max_foreign_loss_increase: Annotated[
        float | None, _setting("Most by which a best version may raise the loss on foreign code; 0.02 is 2 %.")
    ] = None,
    proof_places: Annotated[
        int | None, _setting("Held-out places where base and adapter write a line, to compare them.")
    ] = None,
    keep_checkpoints: Annotated[int | None, _setting("Checkpoints beside best, last and kept ones.")] = None,
    from_: Annotated[
        str, typer.Option("--from", metavar="RUN[/STEP]", help="Start with the weights of this checkpoint (best one).")
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    json: Json = False,
) -> None:
    """Train an adapter. Settings left out are chosen from the dataset, the model and the machine, with reasons.

    Examples: codegraft train start -p acme --watch

    codegraft train start -p acme --lora-r 32 --train-steps 200 --title "rank 32"

    codegraft train start -p acme --from r-0abc        # go on from that run's best adapter, on the newest dataset
    """
    hyperparameters = _requested(
        lora_r=lora_r,
        lora_alpha=lora_alpha,
        lora_init_scale=lora_init_scale,
        lora_dropout=lora_dropout,
        target_module=target_module,
        learning_rate=learning_rate,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        train_steps=train_steps,
        decay_steps=decay_steps,
        low_gpu_memory_mode=low_gpu_memory_mode,
        context_length=context_length,
        fim_rate=fim_rate,
        seed=seed,
        time_limit_seconds=time_limit_seconds,
        early_stopping_patience=early_stopping_patience,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        max_eval_tokens=max_eval_tokens,
        max_grad_norm=max_grad_norm,
        max_foreign_loss_increase=max_foreign_loss_increase,
        proof_places=proof_places,
        keep_checkpoints=keep_checkpoints,
    )
    chosen = full_name(names.DATASET, dataset, project) if dataset else ""
    with connect() as client:
        run = client.runs.create(
            project,
            dataset=chosen,
            base_model=model,
            hyperparameters=hyperparameters,
            title=title,
            initial_checkpoint=checkpoint_name(project, from_) if from_ else "",
        )
        if watch:
            run = _follow(client, run.name, json)
        elif json:
            print_json(run)
        else:
            err.print(f"queued {run.name}; follow it with: codegraft train watch --project {project}")
    raise_failure(run.status, run.name)


def plan(project: str, dataset: str, model: str, json: bool, **settings: Any) -> None:
    """Show what a run would do, with the reason of every setting and how long it takes. Nothing is trained.

    Takes the settings of `codegraft train start`: codegraft train plan -p acme --lora-r 32 --time-limit-seconds 600
    """
    chosen = full_name(names.DATASET, dataset, project) if dataset else ""
    with connect() as client:
        found = client.runs.plan(project, _requested(**settings), dataset=chosen, base_model=model)
    if json:
        print_json(found)
        return
    _tell_plan(found)
    err.print(
        f"{found.hyperparameters.train_steps} steps over {found.train_tokens:,} tokens ({found.epochs:.1f} passes), "
        f"about {duration(found.estimated_seconds)}"
    )


def _as_start(command: Callable[..., None]) -> None:
    """Registers a command that takes what `start` takes, but for what only a run has."""
    parameters = inspect.signature(start, eval_str=True).parameters.values()
    taken = [each for each in parameters if each.name not in {"title", "from_", "watch"}]
    command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in taken}
    app.command()(command)


_as_start(plan)


def _requested(
    *, target_module: list[str] | None, low_gpu_memory_mode: Switch | None, **settings: Any
) -> Hyperparameters:
    low = None if low_gpu_memory_mode is None else low_gpu_memory_mode is Switch.ON
    return Hyperparameters(target_modules=target_module or (), low_gpu_memory_mode=low, **settings)


@app.command("list")
def list_(project: Project, follow: Follow = False, json: Json = False) -> None:
    """List the runs of a project, newest first; with --follow each of them, then every change, a line each."""
    with connect() as client:
        if follow:
            print_changes(client.runs.watch_all(project), _change, as_json=json)
            return
        runs = list(client.runs.list(project))
    if json:
        print_json(runs)
        return
    columns = ["RUN", "STATE", "STEP", "BASE LOSS", "BEST LOSS", "BEST STEP", "TITLE"]
    print_table(columns, map(_row, runs), empty=f"no run yet: codegraft train start --project {project}")


def _row(run: Run) -> list[object]:
    return [
        id_of(run.name),
        state_word(run.status.state),
        run.step,
        run.base_test_loss if run.HasField("base_test_loss") else None,
        run.best_test_loss if run.HasField("best_test_loss") else None,
        id_of(run.best_checkpoint),
        run.title,
    ]


def _change(message: WatchRunsResponse) -> list[object]:
    return _row(message.run) if message.HasField("run") else [id_of(message.removed), "removed"]


@app.command()
def show(project: Project, run: RunId = LATEST, json: Json = False) -> None:
    """Show a run: its state, its settings with reasons, its checkpoints, and the proof on held-out code.

    The proof sets the best version against the base model. p is the chance that it is no better, were files and places
    drawn anew; below 0.05 is a proof by custom.
    """
    with connect() as client:
        found = client.runs.get(full_name(names.RUN, run, project))
        checkpoints = list(client.runs.checkpoints(found.name))
    if json:
        print_json({"run": found, "checkpoints": checkpoints})
        return
    _tell(found)
    if found.dataset:
        err.print(f"{found.base_model} on {found.dataset}")
    if found.HasField("plan"):
        _tell_plan(found.plan)
    rows = [
        [c.step, c.test_loss if c.HasField("test_loss") else None, c.best, c.kept, c.sha256[:12], c.size]
        for c in checkpoints
    ]
    print_table(["STEP", "TEST LOSS", "BEST", "KEPT", "SHA-256", "BYTES"], rows, empty="no checkpoint yet")
    if found.HasField("proof"):
        print_table(["PROOF", "BASE", "ADAPTER", "CHANGE", "P"], proof_rows(found.proof), empty="")
        err.print(found.proof.verdict)


@app.command()
def watch(project: Project, run: RunId = LATEST, json: Json = False) -> None:
    """Follow a run to its end: losses as they come; with --json one event a line. Ctrl-C leaves it running."""
    with connect() as client:
        found = client.runs.get(full_name(names.RUN, run, project))
        found = _follow(client, found.name, json)
    raise_failure(found.status, found.name)


@app.command()
def cancel(project: Project, run: RunId = LATEST, json: Json = False) -> None:
    """Ask a run to stop; its checkpoints stay."""
    with connect() as client:
        found = client.runs.get(full_name(names.RUN, run, project))
        cancelled = client.runs.cancel(found.name)
    if json:
        print_json(cancelled)
    else:
        err.print(f"{cancelled.name}: {state_word(cancelled.status.state)}, stops within seconds")


@app.command()
def pause(project: Project, run: RunId = LATEST, json: Json = False) -> None:
    """Stop a run until it is resumed. Nothing is lost, and its device is free for the next one meanwhile."""
    with connect() as client:
        found = client.runs.pause(client.runs.get(full_name(names.RUN, run, project)).name)
    if json:
        print_json(found)
    elif found.status.pause_requested:
        err.print(f"{found.name}: stops within seconds; go on with: codegraft train resume -p {project} {run}")
    else:
        err.print(f"{found.name}: {state_word(found.status.state)}")


@app.command()
def resume(project: Project, run: RunId = LATEST, json: Json = False) -> None:
    """Queue a paused run. It goes on after its last step, to the same adapter as without the pause."""
    with connect() as client:
        found = client.runs.resume(client.runs.get(full_name(names.RUN, run, project)).name)
    if json:
        print_json(found)
    else:
        err.print(f"{found.name}: {state_word(found.status.state)}")


@app.command()
def keep(
    project: Project,
    checkpoint: Annotated[str, typer.Argument(metavar="RUN[/STEP]", help="Which one; of a run its best.")],
    off: Annotated[bool, typer.Option("--off", help="Let it go again.")] = False,
    json: Json = False,
) -> None:
    """Keep a checkpoint though its run has newer ones. Pinning one, and starting a run from one, does so by itself.

    All but the best, the one before it, the last and a few more (--keep-checkpoints) are deleted as newer ones come.
    """
    with connect() as client:
        found = client.runs.keep(checkpoint_name(project, checkpoint), not off)
    if json:
        print_json(found)
    else:
        err.print(f"{found.name}: {'kept' if found.kept else 'goes when newer ones take its place'}")


@app.command()
def plot(
    project: Project,
    run: RunId = LATEST,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Image to write; the suffix chooses the format.")
    ] = Path("loss.png"),
    json: Json = False,
) -> None:
    """Draw train loss, test loss with the best marked, and learning rate of a run; --json prints the points instead."""
    with connect() as client:
        found = client.runs.get(full_name(names.RUN, run, project))
        drawn = curves(story(client, found))
    if json:
        print_json(asdict(drawn))
        return
    draw(drawn, found.title or id_of(found.name), output)
    err.print(f"wrote {output}")


@app.command("tensorboard")
def tensorboard_(
    project: Project,
    run: RunId = LATEST,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Log folder; each run gets a folder of its own in it.")
    ] = Path("tensorboard"),
    json: Json = False,
) -> None:
    """Write a run's losses, learning rate, gradient norm and speed as TensorBoard files; anew each time."""
    with connect() as client:
        found = client.runs.get(full_name(names.RUN, run, project))
        if not found.last_sequence:
            raise FailedPrecondition(f"{found.name} has no story yet", hint="Wait for its first steps.")
        folder = output / id_of(found.name)
        count = tensorboard.write(story(client, found), folder)
    if json:
        print_json({"run": found.name, "folder": str(folder), "scalars": count})
    else:
        err.print(f"wrote {count:,} values to {folder}; look at them with: tensorboard --logdir {output}")


def story(client: Codegraft, run: Run) -> Iterator[RunEvent]:
    """The run's events so far, without waiting for more."""
    if not run.last_sequence:
        return
    for message in client.runs.watch(run.name):
        if message.HasField("event"):
            yield message.event
            if message.event.sequence >= run.last_sequence:
                return


def _follow(client: Codegraft, name: str, as_json: bool) -> Run:
    with JobBar(f"train {id_of(name)}") as bar:
        for message in client.runs.watch(name):
            if as_json:
                print_json(message.event if message.HasField("event") else message.run.status)
                continue
            bar.show(message.run.status)
            if line := sentence(message.event):
                bar.tell(line)
    found = client.runs.get(name)
    if not as_json:
        _tell(found)
    return found


def _tell(run: Run) -> None:
    waiting = run.status.state == JobState.JOB_STATE_QUEUED and run.status.progress.message
    state = "is pausing" if run.status.pause_requested else state_word(run.status.state)
    err.print(f"{run.name}: {waiting or state} at step {run.step}")
    if run.HasField("base_test_loss") and run.HasField("best_test_loss"):
        change = 100 * (run.best_test_loss / run.base_test_loss - 1)
        err.print(f"test loss {run.base_test_loss:.4f} -> {run.best_test_loss:.4f} ({change:+.1f} %)")
    if run.initial_checkpoint:
        err.print(f"started from {run.initial_checkpoint}")
    if run.best_checkpoint:
        err.print(f"best checkpoint {run.best_checkpoint}")


def _tell_plan(plan: Plan) -> None:
    rows = [[setting.name, setting.value, "given" if setting.given else setting.why] for setting in plan.settings]
    print_table(["SETTING", "VALUE", "WHY"], rows, empty="no settings yet")
