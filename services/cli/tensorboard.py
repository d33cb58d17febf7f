"""A run's story as TensorBoard's event files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from codegraft.trainer.v1.hyperparameters_pb2 import Plan
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.cli.connect import id_of
from services.core.errors import FailedPrecondition

SUFFIX = ".codegraft"
"""Of the files written here: another export of the run replaces them, and nothing else."""
_NUMBERS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)


def write(events: Iterable[RunEvent], folder: Path) -> int:
    """Writes the numbers and the settings of a story into a folder, in place of an earlier export.

    Every number of a step is ``step/<field>``, of an evaluation ``evaluation/<field>``, at its step and its time.

    Returns:
        How many numbers there are.

    Raises:
        FailedPrecondition: tensorboardX is not installed, or the folder cannot be written.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise FailedPrecondition("tensorboardX is not installed", hint="pip install 'codegraft[plot]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before, count = list(folder.glob(f"events.*{SUFFIX}")), 0
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as making:
            with contextlib.closing(SummaryWriter(making, filename_suffix=SUFFIX)) as writer:
                for event in events:
                    seconds = event.time.ToNanoseconds() / 1e9
                    for tag, step, value in scalars(event):
                        writer.add_scalar(tag, value, step, walltime=seconds)
                        count += 1
                    if event.HasField("plan"):
                        writer.add_text("plan", as_markdown(event.plan), 0, walltime=seconds)
            for old in before:
                old.unlink(missing_ok=True)
            for made in Path(making).glob("events.*"):
                shutil.move(made, folder / made.name)
    except OSError as error:
        raise FailedPrecondition(f"{folder} cannot be written: {error}", hint="Choose another --output.") from error
    return count


def scalars(event: RunEvent) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of every number in an event of a step or an evaluation."""
    kind = event.WhichOneof("event")
    if kind not in ("step", "evaluation"):
        return
    measured: Message = getattr(event, kind)
    step = event.step.step if kind == "step" else event.evaluation.step
    for field in measured.DESCRIPTOR.fields:
        absent = field.has_presence and not measured.HasField(field.name)
        if field.name != "step" and field.cpp_type in _NUMBERS and not field.is_repeated and not absent:
            yield f"{kind}/{field.name}", step, float(getattr(measured, field.name))
    for source, loss in sorted(event.evaluation.source_losses.items()):
        yield f"evaluation/source_losses/{id_of(source)}", step, loss


def as_markdown(plan: Plan) -> str:
    """The settings with their reasons, as a table."""
    rows = [f"| {each.name} | {each.value} | {'given' if each.given else each.why} |" for each in plan.settings]
    return "\n".join(["| setting | value | why |", "|---|---|---|", *rows])
