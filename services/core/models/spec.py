"""What a base model is, as far as it is known before its weights are here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Function(StrEnum):
    """What a model can be used for; the values are the proto's ModelFunction without its prefix."""

    COMPLETION = "COMPLETION"
    CHAT = "CHAT"
    FINE_TUNING = "FINE_TUNING"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Weights inside an installed distribution, as one GGUF file."""

    distribution: str
    suffix: str

    def __str__(self) -> str:
        return f"the Python package {self.distribution}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face Hub."""

    repo: str

    def __str__(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A local folder with config.json, tokenizer and safetensors."""

    path: Path

    def __str__(self) -> str:
        return f"the folder {self.path}"


@dataclass(frozen=True, slots=True)
class StoreSource:
    """A folder in the object store, put there by ``codegraft models push``."""

    name: str

    def __str__(self) -> str:
        return f"models/{self.name} in the object store"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; enough to tell how much memory it takes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_gated: bool = True
    """Whether an MLP has three matrices (gate, up, down) instead of two."""


@dataclass(frozen=True, slots=True)
class Markers:
    """The tokens that a family of models is prompted with, as text.

    For people: prompts are made from the vocabulary (prompts.detect), and a test holds the two together.
    """

    style: str
    """psm: prefix, suffix, middle; spm: suffix, prefix; plain: no fill-in-the-middle."""
    fim: tuple[str, ...]
    """Before the prefix, before the suffix, before the middle; empty when plain."""
    stop: tuple[str, ...]
    """Any of these ends a completion, and so does any of ``fim``."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One base model."""

    id: str
    """Catalogue id, ``hf:<organisation>/<name>``, ``store:<name>`` or ``dir:<absolute path>``."""
    title: str
    """Name for people."""
    functions: frozenset[Function]
    """What it can be used for."""
    parameters: int
    """Number of weights; 0 while unknown."""
    context_length: int
    """Longest sequence in tokens; 0 while unknown."""
    lora_targets: tuple[str, ...]
    """Modules that LoRA adapts by default; empty means every linear layer but the head."""
    source: WheelSource | HubSource | FolderSource | StoreSource
    """Where its weights come from."""
    shape: Shape | None = None
    """None while unknown."""
    markers: Markers | None = None
    """None while unknown: its tokenizer tells."""
    licence: str = ""
    """SPDX id, or the name of the licence; empty while unknown."""
