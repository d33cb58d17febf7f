"""An adapter as files, in PEFT's format: what is accepted of them, wherever they come from.

Plain LoRA on linear layers is; whatever would make the adapter mean something else than ``W + scale * B A`` is refused
by name, because it would be silently wrong. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.core.errors import AdapterRejected

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_UNUSUAL = (
    *("use_dora", "modules_to_save", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora"),
)
"""Options with which PEFT computes something else."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that train against changed base weights; PEFT can save such an adapter converted, without this."""
_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")

Layers = Mapping[str, tuple[int, int]]
"""(out, in) of the linear layers that an adapter may change, by module path."""
Pairs = dict[str, tuple["torch.Tensor", "torch.Tensor"]]
"""A ``[rank, in]`` and B ``[out, rank]`` by module path."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What counts in adapter_config.json."""

    rank: int
    alpha: float
    scale: float
    """What B A is multiplied by."""
    base_model: str
    """The base as whoever trained it called it: an id, a name of the Hub, or a path of their machine."""


def read_config(file: Path, name: str) -> AdapterConfig:
    """Reads adapter_config.json; as :func:`parse_config`."""
    return parse_config(file.read_bytes(), name)


def parse_config(text: bytes, name: str) -> AdapterConfig:
    """What adapter_config.json says.

    Args:
        name: the adapter's, for messages.

    Raises:
        AdapterRejected: it is not readable, or an option is not plain LoRA.
    """
    try:
        config: dict[str, Any] = dict(json.loads(text.decode()))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterRejected(f"{name}: {CONFIG} is not readable ({error!r})") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterRejected(f"{name} is {config['peft_type']}, not LORA", hint="Train a LoRA adapter.")
    unusual = [key for key in _UNUSUAL if config.get(key)]
    if config.get("bias", "none") != "none":
        unusual.append("bias")
    if str(config.get("init_lora_weights", "")).lower().startswith(_CHANGES_THE_BASE):
        unusual.append("init_lora_weights")
    if unusual:
        raise AdapterRejected(f"{name} uses {unusual[0]}, which is not served", hint=f"Train without {unusual[0]}.")
    if rank < 1 or not math.isfinite(alpha):
        raise AdapterRejected(f"{name}: {CONFIG} says rank {rank}, alpha {alpha}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return AdapterConfig(rank, alpha, scale, str(config.get("base_model_name_or_path") or ""))


def pair_up(tensors: Mapping[str, torch.Tensor], *, name: str, rank: int, layers: Layers, base_model: str) -> Pairs:
    """Pairs up A and B by module path, as PEFT names them.

    Args:
        name: the adapter's, and ``base_model`` the base's: for messages.

    Raises:
        AdapterRejected: a strange name, a half pair, a wrong shape, a value that is not finite, or nothing at all.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for label, tensor in tensors.items():
        path, _, half = label.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".lora_")
        if half not in ("A", "B") or path not in layers:
            raise AdapterRejected(f"{name}: {base_model} has no layer for tensor {label[:200]}")
        if str(tensor.dtype) not in _DTYPES or not _is_finite(tensor):
            raise AdapterRejected(f"{name}: tensor {label[:200]} has values that are not finite numbers")
        halves.setdefault(path, {})[half] = tensor
    if not halves:
        raise AdapterRejected(f"{name} holds no tensors")
    pairs = {}
    for path, pair in halves.items():
        out, width = layers[path]
        wanted = {"A": (rank, width), "B": (out, rank)}
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        if shapes != wanted:
            raise AdapterRejected(f"{name}: layer {path} has shapes {shapes}, not {wanted}")
        pairs[path] = (pair["A"], pair["B"])
    return pairs


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite numbers: NaN is both least and greatest; a fifth of the time of ``isfinite``."""
    if not tensor.numel():
        return True
    least, greatest = tensor.aminmax()
    return math.isfinite(least.item()) and math.isfinite(greatest.item())


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the output head, of the model in a folder, by module path.

    Only its configuration is read: the layers are made without memory behind them. Needs torch and transformers.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def version(folder: Path) -> str:
    """SHA-256 of the weights: what names an adapter."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
