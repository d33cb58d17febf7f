"""The settings of a run as a form: each AUTO (left empty) or a value within its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from google.protobuf.descriptor import FieldDescriptor

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core.errors import InvalidHyperparameter
from services.gateway.console.forms import Form


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of Hyperparameters. Ranges are told to people only; the trainer is who refuses."""

    name: str
    label: str
    range: str
    hint: str = ""

    @property
    def kind(self) -> Literal["whole", "number", "switch", "names"]:
        """How it is written."""
        field = Hyperparameters.DESCRIPTOR.fields_by_name[self.name]
        if field.is_repeated:
            return "names"
        match field.type:
            case FieldDescriptor.TYPE_BOOL:
                return "switch"
            case FieldDescriptor.TYPE_DOUBLE:
                return "number"
            case _:
                return "whole"


GROUPS: tuple[tuple[str, tuple[Setting, ...]], ...] = (
    (
        "Adapter",
        (
            Setting("lora_r", "Rank", "1 to 256"),
            Setting("lora_alpha", "Alpha", "1 to 1024", "Scale of the update is alpha / rank."),
            Setting("lora_dropout", "Dropout", "0 to 0.9"),
            Setting("lora_init_scale", "Initial norm of rows", "1e-06 to 10", "AUTO keeps PEFT's own."),
            Setting("target_modules", "Layers", "names", "Such as q_proj v_proj. AUTO: all linear ones."),
        ),
    ),
    (
        "Optimizer",
        (
            Setting("learning_rate", "Peak learning rate", "1e-09 to 0.1"),
            Setting("train_steps", "Steps", "1 to 1000000"),
            Setting("warmup_steps", "Warmup steps", "0 to 1000000"),
            Setting("decay_steps", "Decay steps", "1 to 1000000"),
            Setting("weight_decay", "Weight decay", "0 to 1"),
            Setting("max_grad_norm", "Largest gradient norm", "1e-06 to 1e+06"),
            Setting("batch_size", "Batch size", "1 to 4096", "Sequences per step."),
            Setting("micro_batch_size", "Micro batch size", "1 to 4096", "Sequences per forward pass."),
            Setting("seed", "Seed", "0 to 9223372036854775807"),
        ),
    ),
    (
        "Data",
        (
            Setting("context_length", "Context length", "64 to 1048576", "Tokens per sequence; the model's at most."),
            Setting("fim_rate", "Share with a middle to fill in", "0 to 1"),
        ),
    ),
    (
        "Ending and measuring",
        (
            Setting("time_limit_seconds", "Time limit in seconds", "1 to 2592000", "AUTO: none."),
            Setting("early_stopping_patience", "Patience", "0 to 1000", "Evaluations without a best; 0: no end by it."),
            Setting("eval_steps", "Steps between evaluations", "1 to 1000000"),
            Setting("checkpoint_steps", "Steps between checkpoints", "1 to 1000000"),
            Setting("keep_checkpoints", "Checkpoints that stay", "0 to 1000", "Beside best, last and kept ones."),
            Setting("max_eval_tokens", "Tokens evaluated", "64 to 1000000000"),
            Setting("max_foreign_loss_increase", "Most forgotten", "0 to 10", "0.02: 2 % more loss on other code."),
            Setting("proof_places", "Places of the proof", "0 to 10000"),
            Setting("low_gpu_memory_mode", "Low GPU memory mode", "on or off", "Less memory for a third more time."),
        ),
    ),
)
"""Every setting, in the order of the form."""
SETTINGS = tuple(setting for _, settings in GROUPS for setting in settings)


def of_form(form: Form) -> Hyperparameters:
    """What the form asks for; fields that are empty stay unset, which is AUTO.

    Raises:
        InvalidArgument: a field holds no number; names it.
    """
    found = Hyperparameters()
    for setting in SETTINGS:
        if not form.text(setting.name):
            continue
        match setting.kind:
            case "names":
                found.target_modules.extend(form.text(setting.name).replace(",", " ").split())
            case "switch":
                found.low_gpu_memory_mode = form.text(setting.name) == "on"
            case "number":
                setattr(found, setting.name, form.number(setting.name))
            case "whole":
                try:
                    setattr(found, setting.name, form.whole(setting.name))
                except ValueError:  # more than the field has bits
                    raise InvalidHyperparameter(
                        f"{setting.name} is out of its range", field=setting.name, hint=f"Use {setting.range}."
                    ) from None
    return found
