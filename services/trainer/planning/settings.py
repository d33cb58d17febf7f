"""The settings of a run: what may be asked for, and what it comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core.errors import InvalidHyperparameter

RANGES: dict[str, tuple[float, float]] = {
    "lora_r": (1, 256),
    "lora_alpha": (1, 1024),
    "lora_init_scale": (1e-6, 10),
    "lora_dropout": (0, 0.9),
    "learning_rate": (1e-9, 0.1),
    "batch_size": (1, 4096),
    "micro_batch_size": (1, 4096),
    "warmup_steps": (0, 1_000_000),
    "weight_decay": (0, 1),
    "train_steps": (1, 1_000_000),
    "decay_steps": (1, 1_000_000),
    "context_length": (64, 1_048_576),
    "fim_rate": (0, 1),
    "seed": (0, 2**63 - 1),
    "time_limit_seconds": (1, 30 * 24 * 3600),
    "early_stopping_patience": (0, 1000),
    "eval_steps": (1, 1_000_000),
    "checkpoint_steps": (1, 1_000_000),
    "max_eval_tokens": (64, 1_000_000_000),
    "max_grad_norm": (1e-6, 1e6),
    "keep_checkpoints": (0, 1000),
    "max_foreign_loss_increase": (0, 10),
    "proof_places": (0, 10_000),
}
"""Lowest and highest value of each setting, both allowed."""


_CAME_LATER = {"keep_checkpoints": 3, "max_foreign_loss_increase": 0.02, "proof_places": 24}
"""Settings that the plans of older releases lack."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting resolved. Fields are those of the proto message Hyperparameters."""

    lora_r: int
    lora_alpha: float
    lora_init_scale: float | None
    """None keeps PEFT's own initialisation."""
    lora_dropout: float
    target_modules: tuple[str, ...]
    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup_steps: int
    weight_decay: float
    train_steps: int
    decay_steps: int
    low_gpu_memory_mode: bool
    context_length: int
    fim_rate: float
    seed: int
    time_limit_seconds: float | None
    """None means no limit."""
    early_stopping_patience: int
    eval_steps: int
    checkpoint_steps: int
    max_eval_tokens: int
    max_grad_norm: float
    keep_checkpoints: int
    max_foreign_loss_increase: float
    proof_places: int

    def to_proto(self) -> Hyperparameters:
        """The message with every field set (but those that are None)."""
        message = Hyperparameters(target_modules=self.target_modules)
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name != "target_modules" and value is not None:
                setattr(message, name, value)
        return message

    @classmethod
    def from_proto(cls, message: Hyperparameters) -> Settings:
        """The inverse of :meth:`to_proto`."""
        values: dict[str, Any] = {
            name: getattr(message, name) if message.HasField(name) else _CAME_LATER.get(name)
            for name in cls.__dataclass_fields__
            if name != "target_modules"
        }
        return cls(target_modules=tuple(message.target_modules), **values)


def check(requested: Hyperparameters, context_length: int) -> None:
    """Refuses values outside their ranges, and two that contradict each other.

    Args:
        context_length: longest sequence of the model, in tokens; 0 while unknown.

    Raises:
        InvalidHyperparameter: names the field, the range and the way out.
    """
    for name, (low, high) in RANGES.items():
        if requested.HasField(name):
            value = float(getattr(requested, name))
            if not math.isfinite(value) or not low <= value <= high:
                raise _invalid(name, f"{name} is {value:g}", f"Use {low:g} to {high:g}, or leave it out for AUTO.")
    if requested.HasField("context_length") and 0 < context_length < requested.context_length:
        raise _invalid(
            "context_length",
            f"context_length is {requested.context_length}, but the model reads {context_length} tokens",
            f"Use 64 to {context_length}, or leave it out for AUTO.",
        )
    for smaller, larger in (
        ("micro_batch_size", "batch_size"),
        ("warmup_steps", "train_steps"),
        ("eval_steps", "train_steps"),
    ):
        both = requested.HasField(smaller) and requested.HasField(larger)
        if both and getattr(requested, smaller) > getattr(requested, larger):
            raise _invalid(
                smaller,
                f"{smaller} ({getattr(requested, smaller)}) is more than {larger} ({getattr(requested, larger)})",
                f"Lower {smaller}, or leave one of the two out for AUTO.",
            )
    both = requested.HasField("micro_batch_size") and requested.HasField("batch_size")
    if both and requested.batch_size % requested.micro_batch_size:
        raise _invalid(
            "micro_batch_size",
            f"batch_size {requested.batch_size} is no multiple of micro_batch_size {requested.micro_batch_size}",
            "Use a divisor of batch_size.",
        )
    strange = [name for name in requested.target_modules if not name.replace("_", "").isalnum()]
    if strange:
        raise _invalid("target_modules", f"{strange[0][:80]!r} is no name of a layer", "Give names such as q_proj.")


def _invalid(field: str, message: str, hint: str) -> InvalidHyperparameter:
    return InvalidHyperparameter(message, field=f"hyperparameters.{field}", hint=hint)
