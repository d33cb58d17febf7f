"""A merged model as one GGUF file, as llama.cpp and its relatives read it.

Names and layouts are those of llama.cpp's convert_hf_to_gguf.py; the mapping of names is the gguf package's own. What
llama.cpp does not read from a file it computes its own way: the activation of GPT-BigCode is GELU in its tanh form.
Written tensor by tensor: what is needed of memory is the largest tensor in fp32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from codegraft.trainer.v1.adapter_pb2 import GGUF_TYPE_BF16, GGUF_TYPE_F16, GgufType
from services.core.errors import NotSupported
from services.trainer.adapters import gguf_tokenizer
from services.trainer.adapters.disk import check_room
from services.trainer.adapters.merge import Merged, Meter

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

FILE = "model.gguf"
_Q8_BLOCK = 32
"""Weights that share a scale; a row that is no multiple of it is kept as float16."""
_POSITIONS = "position_embd.weight"
_NOT_WEIGHTS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|masked_bias)$")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one architecture is laid out in GGUF."""

    arch: gguf.MODEL_ARCH
    norm: str
    """The setting that holds the norms' epsilon."""
    interleaves_rope: bool = False
    """Whether llama.cpp rotates neighbouring rows of q and k, where transformers rotates halves."""
    has_rope: bool = True
    """Without it positions are learned, and embedded like tokens."""


_ARCHITECTURES = {
    "llama": _Architecture(gguf.MODEL_ARCH.LLAMA, "rms_norm_eps", interleaves_rope=True),
    "qwen2": _Architecture(gguf.MODEL_ARCH.QWEN2, "rms_norm_eps"),
    "starcoder2": _Architecture(gguf.MODEL_ARCH.STARCODER2, "norm_epsilon"),
    "gpt_bigcode": _Architecture(gguf.MODEL_ARCH.STARCODER, "layer_norm_epsilon", has_rope=False),
}
_TYPES = {
    GGUF_TYPE_BF16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    GGUF_TYPE_F16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
_Q8 = (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0)


def write(merged: Merged, to: Path, title: str, type: GgufType, meter: Meter) -> None:
    """Writes :data:`FILE` into a folder.

    Args:
        title: name for people, kept in the file.
        type: of the matrices; vectors are fp32.

    Raises:
        NotSupported: the model's architecture, rope scaling or tokenizer has no form in GGUF that is known here.
        ResourceExhausted: the disk has no room.
        Cancelled: the meter was stopped.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(merged.base, local_files_only=True)
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise NotSupported(
            f"a model of type {config.model_type} cannot be written as GGUF",
            field="format",
            hint=f"Possible are {', '.join(_ARCHITECTURES)}; download it as PEFT or MERGED, which every model allows.",
        )
    if not getattr(config, "multi_query", True):
        raise NotSupported(
            f"a model of type {config.model_type} with keys and values for every head (multi_query off) cannot be "
            "written as GGUF: its runtimes know it with one for all heads",
            field="format",
            hint="Download it as PEFT or MERGED.",
        )
    matrix_type, file_type = _TYPES.get(type, _Q8)
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(to / FILE, gguf.MODEL_ARCH_NAMES[architecture.arch])
    try:
        _add_settings(writer, config, architecture, title, file_type)
        gguf_tokenizer.add(writer, merged.base, int(config.vocab_size))
        size, types = 0, {}
        for stored in merged.stored:
            if _NOT_WEIGHTS.search(stored.name):
                continue
            name = _name(names, stored.name)
            types[stored.name] = chosen = _type_of(name, stored.shape, matrix_type)
            nbytes = _bytes_of(stored.shape, chosen)
            size += nbytes
            writer.add_tensor_info(name, stored.shape, _float32(), nbytes, chosen)
        check_room(to, size, "the GGUF file")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        meter.begin(f"writing GGUF in {matrix_type.name}", merged.size)
        for file in merged.files:
            for name, tensor in merged.tensors(file):
                if name in types:
                    writer.write_tensor_data(_quantized(name, tensor, types[name], config, architecture))
                meter.advance(tensor.nbytes)
    finally:
        writer.close()


def _add_settings(
    writer: gguf.GGUFWriter,
    config: PretrainedConfig,
    architecture: _Architecture,
    title: str,
    file_type: LlamaFileType,
) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    # GPT-BigCode calls it n_inner, and leaves out the usual.
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    if head_dim * heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    epsilon = float(getattr(config, architecture.norm))
    if architecture.norm == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(epsilon)
    if architecture.has_rope:
        _add_rope(writer, dict(config.rope_parameters or {}), head_dim)


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":  # DeepSeek-Coder
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default":
        raise NotSupported(
            f"rope scaling of type {kind!r} cannot be written as GGUF yet",
            field="format",
            hint="Download it as MERGED and convert it with llama.cpp's convert_hf_to_gguf.py.",
        )


def _name(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise NotSupported(
            f"GGUF has no name for the tensor {name}", field="format", hint="Download it as PEFT or MERGED."
        )
    return found


def _type_of(name: str, shape: tuple[int, ...], matrix_type: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2 or name == _POSITIONS:  # learned positions are added, not multiplied with
        return GGMLQuantizationType.F32
    if matrix_type == GGMLQuantizationType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return matrix_type


def _bytes_of(shape: tuple[int, ...], type: GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[type]
    return torch.Size(shape).numel() // block * size


def _quantized(
    name: str, tensor: torch.Tensor, type: GGMLQuantizationType, config: Any, architecture: _Architecture
) -> np.ndarray[Any, Any]:
    heads = {".q_proj": config.num_attention_heads, ".k_proj": config.num_key_value_heads}
    count = heads.get(name[-len(".q_proj.weight") : -len(".weight")]) or heads.get(name[-len(".q_proj.bias") : -5])
    if architecture.interleaves_rope and count:
        # [head, half, row of the half] -> [head, row of the half, half]
        rows, *rest = tensor.shape
        tensor = tensor.reshape(count, 2, rows // count // 2, *rest).transpose(1, 2).reshape(rows, *rest)
    return gguf.quantize(tensor.float().contiguous().numpy(), type)


def _float32() -> np.dtype[Any]:
    import numpy as np

    return np.dtype(np.float32)
