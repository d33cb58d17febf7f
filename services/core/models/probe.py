"""The prompt on which an adapter is compared with the one that was trained: ``AdapterProbe`` of its manifest."""

from __future__ import annotations

from services.core.models.prompts import Tokenizer

TOLERANCE = 0.4
"""Nats that losses may differ by in the mean. Between PEFT's bfloat16 and serving, SmolLM2-135M's differ by 0.03 to
0.10; with the sign of the update turned by 0.4 to 1.4. So it finds weights that are damaged or of another training, not
every little change."""
_TEXT = "def main():\n    for line in sys.stdin:\n        print(line.strip())\n"
_TOKENS = 8
"""Few: they are computed beside the steps of completions, when a version is staged (38 ms of a core, 16 tokens 51). The
first are the surest to tell: of 16 a turned sign moves the losses by 0.3 to 1.0 in the mean."""


def prompt(tokenizer: Tokenizer) -> list[int]:
    """Its token ids."""
    return list(tokenizer.encode(_TEXT, add_special_tokens=False))[:_TOKENS]
