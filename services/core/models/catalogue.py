"""The models that can be named, and what is known of each before its weights are here.

A model id is one of four: an id of the catalogue (``smollm2-135m``), ``hf:<organisation>/<name>`` for any causal
language model of the Hugging Face Hub, ``store:<name>`` for a folder in the object store, or ``dir:<absolute path>``
for a folder of this machine in the Hub's layout. Nothing here downloads anything or imports torch.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from services.core.errors import ModelNotFound
from services.core.models.entries import BIGCODE, CODE, CODE_AND_CHAT, ENTRIES, LLAMA, STARCODER2
from services.core.models.spec import (
    FolderSource,
    Function,
    HubSource,
    ModelSpec,
    Shape,
    StoreSource,
    WheelSource,
)

__all__ = ["FolderSource", "Function", "HubSource", "ModelSpec", "Shape", "StoreSource", "WheelSource"]

DEFAULT_MODEL = "smollm2-135m"
"""What a deployment uses where no model is named: small enough for a CPU, real enough to complete code."""


_TARGETS_BY_TYPE = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "granite": LLAMA,
    "starcoder2": STARCODER2,
    "gpt_bigcode": BIGCODE,
}
_UNGATED = ("starcoder2", "gpt_bigcode")
STORE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
"""Names of models in the object store."""
_BY_ID = {spec.id: spec for spec in ENTRIES}
_BY_REPO = {spec.source.repo: spec for spec in ENTRIES if isinstance(spec.source, HubSource)}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def all_models() -> list[ModelSpec]:
    """The catalogue, the default model first."""
    return list(ENTRIES)


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
        return _BY_REPO.get(rest) or ModelSpec(id, rest.split("/")[1], CODE, 0, 0, (), HubSource(rest))
    if kind == "store" and STORE_NAME.fullmatch(rest):
        return ModelSpec(id, rest, CODE, 0, 0, (), StoreSource(rest))
    if kind == "dir" and rest:
        return _folder(Path(rest))
    raise ModelNotFound(
        f"there is no model {id[:200]!r}",
        field="model",
        hint=f"Give hf:<organisation>/<name>, store:<name>, dir:<absolute path>, or one of {', '.join(_BY_ID)}.",
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
            CODE_AND_CHAT if has_chat else CODE,
            parameters,
            int(settings.get("max_position_embeddings") or settings.get("n_positions") or 0),
            _TARGETS_BY_TYPE.get(str(settings.get("model_type")), ()),
            FolderSource(path),
            _shape(settings),
        )
    except (ValueError, AttributeError, OSError) as error:
        raise ModelNotFound(
            f"the model in {str(path)!r} cannot be read: {error}", field="model", hint="Restore the folder."
        ) from None


def _shape(config: dict[str, Any]) -> Shape | None:
    """From a config.json; None for an architecture with other names for its sizes."""
    layers, hidden, heads = (
        int(config.get(name) or config.get(older) or 0)
        for name, older in (
            ("num_hidden_layers", "n_layer"),
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
        )
    )
    if not layers or not hidden or not heads:
        return None
    kv_heads = 1 if config.get("multi_query") else int(config.get("num_key_value_heads") or heads)
    intermediate = int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    head_dim = int(config.get("head_dim") or hidden // heads)
    is_gated = config.get("model_type") not in _UNGATED
    return Shape(layers, hidden, intermediate, heads, kv_heads, head_dim, int(config.get("vocab_size") or 0), is_gated)


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
