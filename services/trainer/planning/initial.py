"""Runs that start from an earlier adapter: what they take over from it, and what may not be asked for differently."""

from __future__ import annotations

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from services.core.errors import InvalidHyperparameter
from services.trainer.planning.plan import amend

_WHY = "as in the checkpoint it starts from"


def inherited(requested: Hyperparameters, manifest: AdapterManifest) -> Hyperparameters:
    """The settings asked for, with the adapter's shape from its manifest.

    Raises:
        InvalidHyperparameter: a setting asks for another shape; names it.
    """
    if requested.HasField("lora_init_scale"):
        raise _refused("lora_init_scale", "an adapter that starts from a checkpoint is not initialised")
    for name in ("lora_r", "lora_alpha"):
        there = getattr(manifest, name)
        if requested.HasField(name) and getattr(requested, name) != there:
            raise _refused(name, f"{name} is {getattr(requested, name):g}, but the checkpoint has {there:g}")
    if requested.target_modules and set(requested.target_modules) != set(manifest.target_modules):
        there = ", ".join(sorted(manifest.target_modules))
        raise _refused("target_modules", f"the checkpoint adapts other layers: {there}")
    settled = Hyperparameters()
    settled.CopyFrom(requested)
    settled.lora_r, settled.lora_alpha = manifest.lora_r, manifest.lora_alpha
    settled.target_modules[:] = manifest.target_modules
    if manifest.fim_sentinels and not requested.HasField("fim_rate"):
        settled.fim_rate = manifest.hyperparameters.fim_rate  # what it was taught must not be forgotten
    return settled


def explain(plan: Plan, requested: Hyperparameters, manifest: AdapterManifest) -> None:
    """Tells of the settings that were taken over that nobody asked for them."""
    names = ["lora_r", "lora_alpha", "target_modules"]
    for name in names + ["fim_rate"] * bool(manifest.fim_sentinels):
        given = bool(requested.target_modules) if name == "target_modules" else requested.HasField(name)
        if not given:
            amend(plan, name, why=_WHY)


def _refused(name: str, message: str) -> InvalidHyperparameter:
    hint = "Leave it out: it comes from the checkpoint."
    return InvalidHyperparameter(message, field=f"hyperparameters.{name}", hint=hint)
