"""Prompt formats: the one place that turns code into token ids, for training and for serving.

The trainer's documents and inference's prompts come from here, so that training order is serving order by construction:
a prompt's ids are a prefix of the ids that the same place would give in training.

families.py lists the models' published formats, detection.py tells a model's by its vocabulary, rendering.py renders.

The name of the repository is in no prompt, though Qwen, StarCoder and SmolLM2 have a marker for it: an editor's request
does not say which source its file belongs to, and a header that only training knows would be one that serving lacks.

Imports no torch. Ids are Python ints.
"""

from services.core.models.prompts.detection import detect, with_sentinels
from services.core.models.prompts.formats import SENTINELS, PromptFormat, Style, Tokenizer
from services.core.models.prompts.rendering import (
    OVERHANG_CHARS,
    STRIDE,
    Prompt,
    completion_prompt,
    training_document,
    training_fim,
)
from services.core.models.prompts.text import encode

__all__ = [
    "OVERHANG_CHARS",
    "SENTINELS",
    "STRIDE",
    "Prompt",
    "PromptFormat",
    "Style",
    "Tokenizer",
    "completion_prompt",
    "detect",
    "encode",
    "training_document",
    "training_fim",
    "with_sentinels",
]
