"""The prompt on which an adapter is compared with the one that was trained: ``AdapterProbe`` of its manifest."""

from __future__ import annotations

from services.core.models.prompts import Tokenizer

TOLERANCE = 0.3
"""Nats that losses may differ by in the mean. See the measurement in tests/unit/trainer/test_probe.py."""
_TEXT = "def main():\n    for line in sys.stdin:\n        print(line.strip())\n"
_TOKENS = 16
"""Few: they are computed beside the steps of completions, when a version is staged."""


def prompt(tokenizer: Tokenizer) -> list[int]:
    """Its token ids."""
    return list(tokenizer.encode(_TEXT, add_special_tokens=False))[:_TOKENS]
