"""A base model that does not fit on one device: its layers are spread over the ranks (FSDP2).

Each rank keeps a part of every layer, and the whole layer is gathered for as long as it is computed with. Only the
frozen base is sharded. The adapter is small and stays whole on every rank, so that gradients, optimizer, checkpoints
and resume are those of plain data parallelism. Embeddings and head stay whole too: the chunked loss reads the head
outside of any layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from services.core.errors import NotSupported


def shard_base(base: Any, device: torch.device, ranks: int) -> None:
    """Spreads the layers of a base model over the ranks, layer by layer, and moves the rest to the device.

    The model may be on the CPU: no device ever holds more than its part and one whole layer. Call it on all ranks, and
    before the adapter is put on.

    Args:
        base: a causal language model of transformers.
        ranks: how many there are; a process group must be open.

    Raises:
        NotSupported: the model has no list of layers.
    """
    decoder = base.base_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise NotSupported(
            "the layers of this model cannot be told, so that it cannot be spread over devices",
            field="base_model",
            hint="Take a model that fits on one device.",
        )
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {parameter for parameter in decoder.parameters()} - {p for layer in layers for p in layer.parameters()}
    # It has no parameters of its own to shard, but it orders the layers: the next one is gathered meanwhile.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    base.to(device)
