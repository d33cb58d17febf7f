"""The prompt on which an adapter is compared with the one that was trained: ``AdapterProbe`` of its manifest."""

from __future__ import annotations

from services.core.models.prompts import Tokenizer

TOLERANCE = 0.4
"""Nats that losses may differ by in the mean. Between the trainer's bfloat16 and serving, SmolLM2-135M's differ by 0.04
to 0.08 in bfloat16 and up to 0.17 in 8 bits; with the sign of the update turned by 0.4 to 1.3. So it finds weights that
are damaged or of another training, not every little change."""
_TEXT = "def main():\n    for line in sys.stdin:\n        print(line.strip())\n"
_TOKENS = 16
"""Few: they are computed beside the steps of completions, when a version is staged."""


def prompt(tokenizer: Tokenizer) -> list[int]:
    """Its token ids."""
    return list(tokenizer.encode(_TEXT, add_special_tokens=False))[:_TOKENS]
