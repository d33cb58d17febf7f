"""docs/models.md, made from the catalogue: ``python -m services.core.models.document > docs/models.md``."""

from __future__ import annotations

from collections.abc import Iterable

from services.core.models import catalogue, memory
from services.core.models.spec import Markers, ModelSpec

_HEAD = """# Base models

<!-- Made from services/core/models by: python -m services.core.models.document > docs/models.md -->

`codegraft models` lists these, with what is cached; `codegraft models show ID` tells everything about one, also of
those that no list names. A model id is one of

| id | is | weights come from |
|---|---|---|
| `qwen2.5-coder-1.5b` | one of the tables below | the Hugging Face Hub, once; the default model from a Python package |
| `hf:<organisation>/<name>` | any causal language model of the Hub | the Hub, once (`HF_TOKEN` for a private one) |
| `store:<name>` | a folder that `codegraft models push DIR NAME` put into the object store | the store: no Internet \
needed |
| `dir:<absolute path>` | a folder of the services' machines in the Hub's layout | there |

How a model wants its prompts (fill-in-the-middle tokens, their order, what ends a completion) is told by its
vocabulary, whatever its id. Only safetensors are read; nothing is unpickled, and no code of a model repository runs.
"""
_MEMORY = f"""
## Memory

In GB (10^9 bytes), by the formulas of [memory.py](../services/core/models/memory.py); each counts
{memory.RUNTIME >> 20} MiB for the process itself.

- *Serve*: weights in bfloat16, keys and values of {memory.SERVED_TOKENS:,} tokens.
- *Train*: the same weights, a LoRA adapter of rank {memory.RANK} on every linear layer with its optimizer, activations
  of one row of {memory.TRAINED_TOKENS:,} tokens (or of the context). *Low*: with `low_gpu_memory_mode`, which keeps
  one activation a layer and computes the rest again.

On a CPU inference holds the weights twice, for steps of few tokens and for those of many. One that has no products of
bfloat16 (AVX2 and nothing newer) trains in float32, which takes up to twice as much.
"""


def markdown() -> str:
    """The page."""
    specs = catalogue.all_models()
    parts = [
        _HEAD,
        "\n## Catalogue\n",
        _table(
            ["id", "name", "weights", "context", "for", "licence", "serve", "train", "low"],
            (_row(spec) for spec in specs),
        ),
        _MEMORY,
        "\n## Tokens\n",
        _table(
            ["models", "order", "fill-in-the-middle tokens", "also end a completion", "LoRA adapts"],
            _families(specs),
        ),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _row(spec: ModelSpec) -> list[str]:
    functions = ", ".join(sorted(function.value.lower().replace("_", "-") for function in spec.functions))
    return [
        f"`{spec.id}`",
        f"[{spec.title}]({spec.source})" if str(spec.source).startswith("https:") else spec.title,
        f"{spec.parameters / 1e9:.2f} B",
        f"{spec.context_length:,}",
        functions,
        spec.licence,
        *(f"{size / 1e9:.1f}" for size in memory.needs(spec)),
    ]


def _families(specs: Iterable[ModelSpec]) -> Iterable[list[str]]:
    alike: dict[tuple[Markers, tuple[str, ...]], list[str]] = {}
    for spec in specs:
        if spec.markers is not None:
            alike.setdefault((spec.markers, spec.lora_targets), []).append(f"`{spec.id}`")
    order = {"psm": "prefix, suffix, middle", "spm": "suffix, prefix, middle", "plain": "left to right only"}
    for (markers, targets), ids in alike.items():
        yield [", ".join(ids), order[markers.style], _code(markers.fim), _code(markers.stop), _code(targets)]


def _code(texts: Iterable[str]) -> str:
    # A bar ends a cell of a table, also within code.
    return " ".join(f"`{text}`".replace("|", "\\|") for text in texts) or "none"


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    print(markdown(), end="")
