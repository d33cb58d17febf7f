"""Whether an adapter may serve: everything is checked before any of it runs, and nothing is ever unpickled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, AdapterProbe
from services.core.errors import AdapterRejected, BaseModelMismatch, DigestMismatch
from services.core.models import adapter_files, prompts
from services.core.models.adapter_files import CONFIG, WEIGHTS
from services.core.models.prompts import SENTINELS, PromptFormat

if TYPE_CHECKING:
    import torch

_HEADER = 1 << 20
"""Most bytes of names and settings."""
_PROBE_TOKENS = 64
"""Most tokens of a probe: it is computed beside the steps of completions."""
_ALLOWED = {WEIGHTS, CONFIG, "README.md"}


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter has to fit."""

    model: str
    """Id of the base model."""
    digest: str
    """Digest of its weights."""
    format: PromptFormat
    """How it wants its prompts."""
    layers: Mapping[str, tuple[int, int]]
    """(out, in) of the layers that an adapter may change, by module path."""
    max_rank: int

    @property
    def width(self) -> int:
        """Numbers that all its layers take for each rank of an adapter."""
        return sum(out + width for out, width in self.layers.values())


def check_manifest(manifest: AdapterManifest, base: Base) -> None:
    """Checks what the manifest says, before anything is fetched.

    Raises:
        BaseModelMismatch: it was trained on other weights.
        AdapterRejected: its rank, its files, its prompt format or its probe.
    """
    if manifest.base_digest != base.digest:
        raise BaseModelMismatch(
            f"{manifest.name} was trained on {manifest.base_model} ({manifest.base_digest[:12] or 'no digest'}), this "
            f"replica serves {base.model} ({base.digest[:12]})",
            hint="Train on the model that is served.",
        )
    if not 1 <= manifest.lora_r <= base.max_rank:
        raise AdapterRejected(f"{manifest.name} has rank {manifest.lora_r}; 1 to {base.max_rank} are served")
    prompt_format(manifest, base)
    paths = {file.path: file for file in manifest.files}
    if strange := sorted(paths.keys() - _ALLOWED):
        raise AdapterRejected(f"{manifest.name} holds {strange[0]}: only safetensors are read, pickles never")
    if missing := sorted({WEIGHTS, CONFIG} - paths.keys()):
        raise AdapterRejected(f"{manifest.name} lacks {missing[0]}")
    if paths[WEIGHTS].size > manifest.lora_r * base.width * 4 + _HEADER or paths[CONFIG].size > _HEADER:
        raise AdapterRejected(f"{manifest.name} is larger than any adapter of rank {manifest.lora_r} can be")
    if paths[WEIGHTS].sha256 != manifest.sha256:
        raise DigestMismatch(f"{manifest.name} names version {manifest.sha256[:12]}, its file is another one")
    if manifest.HasField("probe"):
        probe = manifest.probe
        whole = 2 <= len(probe.ids) <= _PROBE_TOKENS and len(probe.losses) == len(probe.ids) - 1
        if not whole or not math.isfinite(sum(probe.losses)) or not probe.tolerance > 0:
            raise AdapterRejected(f"{manifest.name} has a probe that nothing can be compared with")


def prompt_format(manifest: AdapterManifest, base: Base) -> PromptFormat:
    """How the adapter wants its prompts: as its base model, or with the sentinels that it was taught.

    Raises:
        AdapterRejected: a format that the base's vocabulary does not have.
    """
    if manifest.prompt_format == SENTINELS and manifest.fim_sentinels:
        try:
            return prompts.with_sentinels(base.format, manifest.fim_sentinels)
        except ValueError as error:
            raise AdapterRejected(f"{manifest.name} fills in the middle with other tokens: {error}") from None
    if manifest.prompt_format not in ("", base.format.name):
        raise AdapterRejected(
            f"{manifest.name} was trained on prompts of format {manifest.prompt_format}, not {base.format.name}"
        )
    return base.format


def check_config(config: bytes, manifest: AdapterManifest) -> float:
    """Checks adapter_config.json; the scale that B's products get.

    Raises:
        AdapterRejected: an option that is not plain LoRA, or a rank other than the manifest's.
    """
    found = adapter_files.parse_config(config, manifest.name)
    if found.rank != manifest.lora_r:
        raise AdapterRejected(f"{manifest.name}: {CONFIG} says rank {found.rank}, not {manifest.lora_r}")
    return found.scale


def check_tensors(
    tensors: Mapping[str, torch.Tensor], manifest: AdapterManifest, base: Base
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs up A and B by module path, as PEFT names them.

    Raises:
        AdapterRejected: as :func:`services.core.models.adapter_files.pair_up`.
    """
    return adapter_files.pair_up(
        tensors, name=manifest.name, rank=manifest.lora_r, layers=base.layers, base_model=base.model
    )


def check_probe(checkpoint: str, probe: AdapterProbe | None, losses: Sequence[float]) -> None:
    """Compares what an adapter makes of a prompt here with what it made of it when it was written.

    Args:
        probe: None when nobody computed it: then the losses only have to be numbers.
        losses: of the tokens after the first, in nats.

    Raises:
        AdapterRejected: they are not finite, or too far from the recorded ones.
    """
    if not all(math.isfinite(loss) for loss in losses):
        raise AdapterRejected(f"{checkpoint} gives logits that are not finite numbers")
    if probe is None:
        return
    apart = sum(abs(here - then) for here, then in zip(losses, probe.losses, strict=True)) / len(losses)
    if apart > probe.tolerance:
        raise AdapterRejected(
            f"{checkpoint} is not the adapter that was trained: on the probe its losses are {apart:.2f} nats off, "
            f"{probe.tolerance:g} are allowed",
            hint="Its weights were changed after training, or the base model computes something else here.",
        )
