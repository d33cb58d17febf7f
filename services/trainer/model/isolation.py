"""Whether a model keeps the documents of a row apart: most tell them by their positions, but not every one has to."""

from __future__ import annotations

from services.core.errors import NotSupported
from services.trainer.corpus.packing import Row
from services.trainer.model.lora import Trainee

_TOKENS = 24
_MOST = 0.5
"""Nats per token. A model that sees the first copy of a text foresees the second one (SmolLM2: 11.4 nats apart); bf16
alone moves the loss by 0.03."""


def check(trainee: Trainee, vocabulary: int) -> None:
    """Compares a text on its own with the same text behind a copy of itself in one row.

    Args:
        vocabulary: number of tokens.

    Raises:
        NotSupported: the second copy sees the first one.
    """
    ids = [(n * n * 7919 + 101) % vocabulary for n in range(_TOKENS)]
    alone, packed = Row(), Row()
    for row, copies in ((alone, 1), (packed, 2)):
        for _ in range(copies):
            row.add(ids, 0, _TOKENS - 1)
    second = trainee.losses([packed])[0][_TOKENS - 1 :].float()
    if float((second - trainee.losses([alone])[0].float()).abs().mean()) > _MOST:
        raise NotSupported(
            "documents that share a row see each other in this model, so that it cannot be trained on packed rows",
            field="base_model",
            hint="Take another base model.",
        )
