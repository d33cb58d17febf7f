"""A base model with an adapter added to its weights, read and written tensor by tensor.

The model itself is never built: what is needed of memory is one file of the base, not the whole of it. Needs torch.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from services.core.errors import Cancelled, NotSupported
from services.core.models import adapter_files, weights
from services.core.models.adapter_files import Pairs
from services.trainer.adapters.disk import check_room


class Meter:
    """How far a conversion is: written by the thread that converts, read by whoever tells of it, who may stop it."""

    def __init__(self) -> None:
        self.done = 0
        self.total = 0
        """Both in bytes read; the total is 0 while unknown."""
        self.phase = "waiting for another conversion"
        self._stopped = threading.Event()

    def begin(self, phase: str, total: int) -> None:
        """A new count."""
        self.phase, self.done, self.total = phase, 0, total

    def advance(self, size: int) -> None:
        """Counts bytes. Raises Cancelled once it was stopped."""
        self.done += size
        if self._stopped.is_set():
            raise Cancelled("the download was given up")

    def stop(self) -> None:
        """Ends the conversion at its next tensor."""
        self._stopped.set()


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the base's files hold it."""

    file: Path
    name: str
    shape: tuple[int, ...]


class Merged:
    """The tensors of a base model with ``scale * B A`` added to each weight that the adapter changes.

    Raises:
        AdapterRejected: the adapter does not fit the base.
        NotSupported: the base's files name or keep their weights in a way that cannot be merged.
    """

    def __init__(self, base: Path, adapter: Path, name: str) -> None:
        self.base = base
        config = adapter_files.read_config(adapter / adapter_files.CONFIG, name)
        layers = adapter_files.linear_layers(base)
        self._pairs: Pairs = adapter_files.pair_up(
            load_file(adapter / adapter_files.WEIGHTS), name=name, rank=config.rank, layers=layers, base_model=base.name
        )
        self._scale = config.scale
        self.files = sorted(base.glob("*.safetensors"))
        self.stored = [stored for file in self.files for stored in _stored(file)]
        missing = {f"{path}.weight" for path in self._pairs} - {stored.name for stored in self.stored}
        if missing:
            raise NotSupported(
                f"the base's files have no weight {min(missing)}, so nothing can be added to it",
                field="format",
                hint="Download the adapter as PEFT, and merge it with PEFT.",
            )

    @property
    def size(self) -> int:
        """Bytes of the base's weights, and of the merged ones."""
        return sum(file.stat().st_size for file in self.files)

    def tensors(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one of the files, in the order of :attr:`stored`, in their own type."""
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, self._merge(name, opened.get_tensor(name))

    def write(self, to: Path, meter: Meter) -> None:
        """Writes a model folder: the base's other files, and its weights with the adapter in them.

        Raises:
            ResourceExhausted: the disk has no room.
            Cancelled: the meter was stopped.
        """
        check_room(to, self.size, "the merged model")
        for pattern in weights.MODEL_FILES:
            for file in self.base.glob(pattern):
                if file.suffix != ".safetensors" and not file.name.startswith("."):
                    shutil.copyfile(file, to / file.name)
        meter.begin("merging", self.size)
        for file in self.files:
            merged = {}
            for name, tensor in self.tensors(file):
                merged[name] = tensor.contiguous()
                meter.advance(tensor.nbytes)
            save_file(merged, to / file.name, metadata={"format": "pt"})

    def _merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        pair = self._pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return weight
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise NotSupported(
                f"the base keeps {name} as {weight.dtype}, to which nothing can be added",
                field="format",
                hint="Download the adapter as PEFT.",
            )
        a, b = pair
        return (weight.float() + self._scale * (b.float() @ a.float())).to(weight.dtype)


def _stored(file: Path) -> list[Stored]:
    with safe_open(file, framework="pt") as opened:
        return [Stored(file, name, tuple(opened.get_slice(name).get_shape())) for name in sorted(opened.keys())]
