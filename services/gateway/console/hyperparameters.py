"""The settings of a run as a form."""

from __future__ import annotations

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.gateway.console import settings
from services.gateway.console.forms import Form
from services.gateway.console.settings import Setting, Settings

_setting = Settings(Hyperparameters)

GROUPS: tuple[tuple[str, tuple[Setting, ...]], ...] = (
    (
        "Adapter",
        (
            _setting("lora_r", "Rank", "1 to 256"),
            _setting("lora_alpha", "Alpha", "1 to 1024", "Scale of the update is alpha / rank."),
            _setting("lora_dropout", "Dropout", "0 to 0.9"),
            _setting("lora_init_scale", "Initial norm of rows", "1e-06 to 10", "AUTO keeps PEFT's own."),
            _setting("target_modules", "Layers", "names", "Such as q_proj v_proj. AUTO: all linear ones."),
        ),
    ),
    (
        "Optimizer",
        (
            _setting("learning_rate", "Peak learning rate", "1e-09 to 0.1"),
            _setting("train_steps", "Steps", "1 to 1000000"),
            _setting("warmup_steps", "Warmup steps", "0 to 1000000"),
            _setting("decay_steps", "Decay steps", "1 to 1000000"),
            _setting("weight_decay", "Weight decay", "0 to 1"),
            _setting("max_grad_norm", "Largest gradient norm", "1e-06 to 1e+06"),
            _setting("batch_size", "Batch size", "1 to 4096", "Sequences per step."),
            _setting("micro_batch_size", "Micro batch size", "1 to 4096", "Sequences per forward pass."),
            _setting("seed", "Seed", "0 to 9223372036854775807"),
        ),
    ),
    (
        "Data",
        (
            _setting("context_length", "Context length", "64 to 1048576", "Tokens per sequence; the model's at most."),
            _setting("fim_rate", "Share with a middle to fill in", "0 to 1"),
        ),
    ),
    (
        "Ending and measuring",
        (
            _setting("time_limit_seconds", "Time limit in seconds", "1 to 2592000", "AUTO: none."),
            _setting(
                "early_stopping_patience", "Patience", "0 to 1000", "Evaluations without a best; 0: no end by it."
            ),
            _setting("eval_steps", "Steps between evaluations", "1 to 1000000"),
            _setting("checkpoint_steps", "Steps between checkpoints", "1 to 1000000"),
            _setting("keep_checkpoints", "Checkpoints that stay", "0 to 1000", "Beside best, last and kept ones."),
            _setting("max_eval_tokens", "Tokens evaluated", "64 to 1000000000"),
            _setting("max_foreign_loss_increase", "Most forgotten", "0 to 10", "0.02: 2 % more loss on other code."),
            _setting("proof_places", "Places of the proof", "0 to 10000"),
            _setting("low_gpu_memory_mode", "Low GPU memory mode", "on or off", "Less memory for a third more time."),
        ),
    ),
)
"""Every setting, in the order of the form."""
SETTINGS = tuple(setting for _, settings in GROUPS for setting in settings)


def of_form(form: Form) -> Hyperparameters:
    """What the form asks for; fields that are empty stay unset, which is AUTO.

    Raises:
        InvalidArgument: a field holds no such value; names it.
    """
    found = Hyperparameters()
    settings.read(found, SETTINGS, form)
    return found
