"""What the machine can do: measured by a worker on its model, guessed where nothing was measured yet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from services.core.errors import InvalidArgument, JobCancelled
from services.core.models.catalogue import ModelSpec
from services.trainer.planning.plan import Facts

if TYPE_CHECKING:
    import torch

    from services.trainer.corpus.data import Corpus
    from services.trainer.model.lora import Trainee
    from services.trainer.planning.settings import Settings
    from services.trainer.ranks import Ranks

_CPU_FLOPS_PER_CORE = 7e10
"""Of LoRA training in bf16, as measured with the default model; counts 4 FLOP per parameter and token."""
_GPU_FLOPS = 1.5e14
_BYTES_PER_TOKEN = 3.5
"""Of code, where a scan did not count tokens."""


_PASSES = 2
"""The faster one counts, for the machine may have had other work; the dry run before has allocated and tuned."""
_PATIENCE_SECONDS = 30.0
_MOST_OF_A_GPU = 0.6
"""Share of its memory that a base in bf16 may take; the rest is for activations, adapter and optimizer."""
_LEAST_SHARE = 0.6
"""Of the guessed speed: a lower measurement is put down to other work."""


def devices(wanted: str, listed: Sequence[str], each: int) -> list[tuple[str, ...]]:
    """The devices of this process in groups, each good for one run at a time. Needs no torch.

    Args:
        wanted: "cpu", "cuda" or "auto".
        listed: by name, if somebody chose them.
        each: devices of a run.

    Raises:
        InvalidArgument: there are GPUs, but too few for one run.
    """
    found = list(listed) if listed or wanted == "cpu" else [f"cuda:{number}" for number in range(_gpus())]
    if not any(name.startswith("cuda") for name in found):
        return [()]  # all processes of a run share the CPU
    if len(found) < each:
        raise InvalidArgument(
            f"a run takes {each} devices, and there are {len(found)}",
            field="trainer_processes",
            hint="Lower CODEGRAFT_TRAINER_PROCESSES.",
        )
    return [tuple(found[start : start + each]) for start in range(0, len(found) - each + 1, each)]


def _gpus() -> int:
    """GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"])
    return sum(file.name.removeprefix("nvidia").isdecimal() for file in Path("/dev").glob("nvidia*"))


def device(wanted: str) -> torch.device:
    """The device to train on: the one of that name, and for "auto" a GPU when there is one."""
    import torch

    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda" if wanted == "auto" else wanted)


def guess_speed(spec: ModelSpec, *, on_gpu: bool) -> float:
    """Tokens a second that training probably takes."""
    flops = _GPU_FLOPS if on_gpu else _CPU_FLOPS_PER_CORE * (os.cpu_count() or 1)
    return flops / (4 * max(1, spec.parameters))


def shards(spec: ModelSpec, device: torch.device, ranks: Ranks, wanted: str) -> bool:
    """Whether the base is spread over the ranks: "on", "off", or "auto", when it would fill a GPU."""
    if ranks.size == 1 or wanted != "auto":
        return ranks.size > 1 and wanted == "on"
    if device.type == "cpu":
        return False
    import torch

    room = int(torch.cuda.get_device_properties(device).total_memory)
    # The same on all ranks, even if their GPUs differ.
    return ranks.any(2 * spec.parameters > _MOST_OF_A_GPU * room)


def measure_speed(
    trainee: Trainee,
    corpus: Corpus,
    settings: Settings,
    guess: float,
    is_cancelled: Callable[[], bool],
    ranks: Ranks,
) -> float:
    """Tokens a second of one micro-batch on every rank, forward and backward; leaves the adapter as it was.

    Raises:
        JobCancelled.
    """
    rows = corpus.batch(0, settings.batch_size)[: settings.micro_batch_size]
    tokens = sum(len(row.ids) for row in rows)
    best = float("inf")
    for _ in range(_PASSES):
        if ranks.any(is_cancelled()):
            raise JobCancelled("cancelled while the speed was measured")
        began = time.monotonic()
        trainee.accumulate(rows, tokens)
        trainee.drop_gradients()
        best = min(best, time.monotonic() - began)
        if ranks.any(best > _PATIENCE_SECONDS):
            break
    # A machine that is busy just now must not make a plan of a few steps: the time limit holds in any case.
    return max(ranks.size * ranks.least(tokens / best), _LEAST_SHARE * guess)


def facts(
    spec: ModelSpec,
    *,
    train_tokens: int,
    train_bytes: int,
    test_tokens: int,
    base_loss: float,
    has_fim: bool,
    speed: float,
    on_gpu: bool,
) -> Facts:
    """What a plan is made from; tokens are guessed from bytes where nobody counted them."""
    return Facts(
        train_tokens=train_tokens or round(train_bytes / _BYTES_PER_TOKEN),
        test_tokens=test_tokens,
        base_loss=base_loss,
        parameters=spec.parameters,
        context_length=spec.context_length,
        lora_targets=spec.lora_targets,
        has_fim=has_fim,
        tokens_per_second=speed,
        on_gpu=on_gpu,
    )
