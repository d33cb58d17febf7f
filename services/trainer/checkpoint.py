"""What a run leaves on disk: the adapter for those who serve it, and the state for a process that goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from codegraft.trainer.v1.checkpoint_pb2 import AdapterProbe
from services.core.errors import AdapterRejected
from services.core.models import probe
from services.trainer.corpus.data import Row
from services.trainer.model.lora import CONFIG, WEIGHTS, Trainee
from services.trainer.proving.proof import Measures
from services.trainer.state import State

STATE_TENSORS = "state.safetensors"
STATE_NUMBERS = "state.json"
_NUMBERS = (
    "step",
    "seconds",
    "base_loss",
    "best_loss",
    "best_step",
    "best_strength",
    "evaluations_without_gain",
    "evaluated_step",
    "ended",
    "step_seconds",
    "evaluation_seconds",
    "commit_seconds",
    "proof_seconds",
    "lowest_loss",
)
_MEASURES = ("base", "best")


def save_adapter(
    trainee: Trainee, folder: Path, base_model: str, weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, Path], str]:
    """Writes the adapter as a PEFT directory; returns its files by name, and its version.

    The version is the SHA-256 of the weights.

    Args:
        weights: a copy of it that is written instead of what it is now, see :meth:`Trainee.weights`.
    """
    with _wearing(trainee, weights):
        trainee.save(folder, base_model)
    files = {name: folder / name for name in (WEIGHTS, CONFIG)}
    with files[WEIGHTS].open("rb") as file:
        return files, hashlib.file_digest(file, "sha256").hexdigest()


def probe_adapter(
    trainee: Trainee, ids: Sequence[int], weights: Mapping[str, torch.Tensor] | None = None
) -> AdapterProbe:
    """What the adapter makes of a prompt: who loads it later compares.

    Args:
        ids: the prompt, at least two tokens.
        weights: as of :func:`save_adapter`.
    """
    with _wearing(trainee, weights):
        (losses,) = trainee.losses([Row(list(ids[:-1]), list(ids[1:]), list(range(len(ids) - 1)))])
    return AdapterProbe(ids=ids, losses=losses.tolist(), tolerance=probe.TOLERANCE)


@contextmanager
def _wearing(trainee: Trainee, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Computes with a copy of the adapter for a while; None for what it is now."""
    if weights is not None:
        trainee.wear(weights)
    try:
        yield
    finally:
        if weights is not None:
            trainee.publish()


def load_adapter(trainee: Trainee, folder: Path) -> None:
    """Puts an adapter's weights on the trainee; the optimizer's moments stay.

    Args:
        folder: a PEFT directory.

    Raises:
        AdapterRejected: it is not of the trainee's shape.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterRejected(f"the adapter cannot be read: {error}", field="initial_checkpoint") from None
    wanted = {name.replace(".default.", "."): master for name, master in trainee.masters.items()}  # as PEFT saves them
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: m.shape for name, m in wanted.items()}:
        raise AdapterRejected(
            "the adapter's weights are not of the shape that its manifest tells",
            field="initial_checkpoint",
            hint="Start from another checkpoint.",
        )
    with torch.no_grad():
        for name, master in wanted.items():
            master.copy_(tensors[name])
    trainee.publish()


def save_state(
    trainee: Trainee, optimizer: torch.optim.AdamW, state: State, folder: Path, *, owner: str = ""
) -> dict[str, Path]:
    """Writes masters, optimizer moments, counters and the best weights; returns the files by name.

    There is no random state to keep: order, cuts and dropout are functions of the seed and the step.

    Args:
        owner: the attempt, written into the files. States are deleted by content: otherwise two runs of the same
            settings would delete each other's, and a successor those of a worker that stood still for a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, master in trainee.masters.items():
        tensors[f"master/{name}"] = master.detach().contiguous()
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).contiguous()
    tensors |= {f"best/{name}": tensor.contiguous() for name, tensor in state.best_weights.items()}
    save_file(tensors, folder / STATE_TENSORS, metadata={"owner": owner})
    numbers: dict[str, Any] = {name: getattr(state, name) for name in _NUMBERS}
    numbers |= {name: asdict(found) for name in _MEASURES if (found := getattr(state, name)) is not None}
    (folder / STATE_NUMBERS).write_text(json.dumps({"owner": owner, "state": numbers}, sort_keys=True))
    return {name: folder / name for name in (STATE_TENSORS, STATE_NUMBERS)}


def load_state(trainee: Trainee, optimizer: torch.optim.AdamW, folder: Path) -> State:
    """Puts the trainee and its optimizer where :func:`save_state` found them."""
    tensors = load_file(folder / STATE_TENSORS)
    with torch.no_grad():
        for name, master in trainee.masters.items():
            master.copy_(tensors.pop(f"master/{name}"))
    best_weights = {name: tensors.pop(f"best/{name}") for name in trainee.masters if f"best/{name}" in tensors}
    by_master: dict[str, dict[str, torch.Tensor]] = {}
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        by_master.setdefault(name, {})[key] = tensor
    for name, values in by_master.items():
        master = trainee.masters[name]
        optimizer.state[master] = {
            key: value if key == "step" else value.to(master.device) for key, value in values.items()
        }
    trainee.publish()
    numbers = json.loads((folder / STATE_NUMBERS).read_text())["state"]
    numbers |= {name: Measures(**numbers[name]) for name in _MEASURES if name in numbers}
    return State(**numbers, best_weights=best_weights)
