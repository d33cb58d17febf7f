"""Whether an adapter may serve: everything is checked before any of it runs, and nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.errors import AdapterRejected, BaseModelMismatch, DigestMismatch

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ALLOWED = {WEIGHTS, CONFIG, "README.md"}
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter has to fit."""

    model: str
    """Id of the base model."""
    digest: str
    """Digest of its weights."""
    prompt_format: str
    """Name of its prompt format."""
    layers: Mapping[str, tuple[int, int]]
    """(out, in) of the layers that an adapter may change, by module path."""
    max_rank: int


def check_manifest(manifest: AdapterManifest, base: Base) -> None:
    """Checks what the manifest says, before anything is fetched.

    Raises:
        BaseModelMismatch: it was trained on other weights.
        AdapterRejected: its rank, its files or its prompt format.
    """
    if manifest.base_digest != base.digest:
        raise BaseModelMismatch(
            f"{manifest.name} was trained on {manifest.base_model} ({manifest.base_digest[:12] or 'no digest'}), this "
            f"replica serves {base.model} ({base.digest[:12]})",
            hint="Train on the model that is served.",
        )
    if not 1 <= manifest.lora_r <= base.max_rank:
        raise AdapterRejected(f"{manifest.name} has rank {manifest.lora_r}; 1 to {base.max_rank} are served")
    if manifest.prompt_format and manifest.prompt_format != base.prompt_format:
        raise AdapterRejected(
            f"{manifest.name} was trained on prompts of format {manifest.prompt_format}, not {base.prompt_format}"
        )
    paths = {file.path: file for file in manifest.files}
    if strange := sorted(paths.keys() - _ALLOWED):
        raise AdapterRejected(f"{manifest.name} holds {strange[0]}: only safetensors are read, pickles never")
    if missing := sorted({WEIGHTS, CONFIG} - paths.keys()):
        raise AdapterRejected(f"{manifest.name} lacks {missing[0]}")
    if paths[WEIGHTS].sha256 != manifest.sha256:
        raise DigestMismatch(f"{manifest.name} names version {manifest.sha256[:12]}, its file is another one")


def check_config(folder: Path, manifest: AdapterManifest) -> float:
    """Checks adapter_config.json; the scale that B's products get.

    Raises:
        DigestMismatch: the weights are not those of the version.
        AdapterRejected: an option that is not plain LoRA, or a rank other than the manifest's.
    """
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != manifest.sha256:
        raise DigestMismatch(f"{manifest.name}: the weights have digest {digest[:12]}, not {manifest.sha256[:12]}")
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text()))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterRejected(f"{manifest.name}: {CONFIG} is not readable ({error!r})") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterRejected(f"{manifest.name} is {config['peft_type']}, not LORA")
    unusual = [key for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "rank_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        unusual.append("bias")
    if config.get("alpha_pattern"):
        unusual.append("alpha_pattern")
    if unusual:
        raise AdapterRejected(f"{manifest.name} uses {unusual[0]}, which is not served")
    if rank != manifest.lora_r or not math.isfinite(alpha):
        raise AdapterRejected(f"{manifest.name}: {CONFIG} says rank {rank}, alpha {alpha}, not rank {manifest.lora_r}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def check_tensors(
    tensors: Mapping[str, torch.Tensor], manifest: AdapterManifest, base: Base
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs up A and B by module path, as PEFT names them.

    Raises:
        AdapterRejected: a strange name, a half pair, a wrong shape, a value that is not finite, or nothing at all.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, half = name.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".lora_")
        if half not in ("A", "B") or path not in base.layers:
            raise AdapterRejected(f"{manifest.name}: {base.model} has no layer for tensor {name}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterRejected(f"{manifest.name}: tensor {name} has values that are not finite numbers")
        halves.setdefault(path, {})[half] = tensor
    if not halves:
        raise AdapterRejected(f"{manifest.name} holds no tensors")
    pairs = {}
    for path, pair in halves.items():
        rank, (out, width) = manifest.lora_r, base.layers[path]
        wanted = {"A": (rank, width), "B": (out, rank)}
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        if shapes != wanted:
            raise AdapterRejected(f"{manifest.name}: layer {path} has shapes {shapes}, not {wanted}")
        pairs[path] = (pair["A"], pair["B"])
    return pairs
