"""How much memory a model takes, by formulas that anyone can check. Bytes throughout; weights count 2 (bfloat16).

They are estimates: an allocator's slack, a GPU's context and what an attention kernel needs for itself come on top,
which is what :data:`RUNTIME` stands for.
"""

from __future__ import annotations

from services.core.models.spec import ModelSpec, Shape

RUNTIME = 512 << 20
"""Of a process with torch in it, beside its tensors."""
SERVED_TOKENS = 8192
"""Of all running requests together, for which keys and values are counted."""
TRAINED_TOKENS = 2048
"""Of the row that training is counted for, or the model's context where that is shorter."""
RANK = 16
_HEAD_ROWS = 256
"""Positions whose logits are made at once in training, in fp32, with their gradients and a copy."""
_PER_ADAPTER_WEIGHT = 20
"""fp32 master, its gradient and AdamW's two moments, and the bfloat16 weight with its gradient."""


def needs(spec: ModelSpec) -> tuple[int, int, int]:
    """Bytes to serve it, to train it, and to train it in low memory mode; zeros while its sizes are unknown."""
    if spec.shape is None:
        return 0, 0, 0
    size, shape, context = spec.parameters, spec.shape, spec.context_length
    return (
        serving(size, shape),
        training(size, shape, context, low_memory=False),
        training(size, shape, context, low_memory=True),
    )


def serving(parameters: int, shape: Shape) -> int:
    """Weights, keys and values of SERVED_TOKENS tokens, RUNTIME.

    ``2 P + 2 * 2 * layers * kv_heads * head_dim * tokens + RUNTIME``
    """
    return 2 * parameters + 4 * shape.layers * shape.kv_heads * shape.head_dim * SERVED_TOKENS + RUNTIME


def training(parameters: int, shape: Shape, context_length: int, *, low_memory: bool) -> int:
    """LoRA of RANK on every linear layer, one row of TRAINED_TOKENS tokens at a time.

    ``2 P + 20 * adapter weights + activations + 3 * 4 * 256 * vocabulary + RUNTIME``. A layer keeps per token, in
    elements of 2 bytes, 8 hidden (inputs of norms and projections, q, attention, residuals), k and v, and 3 (gated)
    or 2 intermediate. In low memory mode only each layer's input is kept, and one layer's activations at a time.

    SmolLM2-135M's trainer on a CPU was measured at 2.14 GB, and 1.05 GB in low memory mode; this says 2.23 and 1.16.
    """
    tokens = min(TRAINED_TOKENS, context_length or TRAINED_TOKENS)
    kv = shape.kv_heads * shape.head_dim
    layer = 2 * tokens * (8 * shape.hidden + 2 * kv + (3 if shape.is_gated else 2) * shape.intermediate)
    activations = shape.layers * 2 * tokens * shape.hidden + layer if low_memory else shape.layers * layer
    head = 3 * 4 * _HEAD_ROWS * shape.vocabulary
    return 2 * parameters + _PER_ADAPTER_WEIGHT * adapter_weights(shape) + activations + head + RUNTIME


def adapter_weights(shape: Shape, rank: int = RANK) -> int:
    """Weights of LoRA on every linear layer of the blocks: rank * (in + out) each."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + q) + 2 * (shape.hidden + kv)
    mlp = (3 if shape.is_gated else 2) * (shape.hidden + shape.intermediate)
    return rank * shape.layers * (attention + mlp)
