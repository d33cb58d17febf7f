"""The loaded base model with its engine: everything that needs torch is made here, once, off the event loop."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from transformers import PreTrainedModel

from services.core.errors import AdapterRejected, ResourceExhausted
from services.core.models import probe, prompts, weights
from services.core.models.catalogue import ModelSpec
from services.core.models.spelling import Spelling, token_bytes
from services.inference.adapters import lora
from services.inference.adapters.verify import Base
from services.inference.engine.engine import Engine
from services.inference.engine.layers import Kind, packs, speed_up
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Limits

_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many sizes of products oneDNN, and torch's layer over it, keep code for; they say 1,024, which a service that
reads prompts of all lengths comes to fill for hours."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model that serves."""

    model: PreTrainedModel
    base: Base
    """What adapters have to fit."""
    tokenizer: Any
    """transformers' tokenizer; not thread-safe, see Prompter."""
    format: prompts.PromptFormat
    vocabulary: list[bytes]
    """Bytes of every token id."""
    context_length: int
    """Longest sequence in tokens."""
    engine: Engine
    """Started."""

    runner: Runner
    """The engine's."""
    probe_ids: list[int]
    """The prompt of :meth:`probe` for an adapter that has none of its own."""

    def shared(self) -> AbstractContextManager[Any]:
        """Held while somebody needs the processor: meanwhile steps that run on it leave half of the cores."""
        return self.runner.shared()

    def read(self, data: bytes) -> Mapping[str, torch.Tensor]:
        """The tensors of a safetensors file, on the CPU."""
        return safetensors.load(data)

    def prepare(
        self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float, sha256: str
    ) -> lora.Weights:
        """Verified matrices, ready to run on this model.

        Raises:
            ResourceExhausted: the device has no memory for them now.
        """
        with _device_memory(), self.runner.beside:
            return lora.prepare(pairs, scale, self.model.dtype, self.model.device, sha256)

    def stage(self, weights: lora.Weights) -> None:
        """Puts an adapter where steps find it that mix several; from any thread, beside the steps.

        Raises:
            ResourceExhausted: as :meth:`prepare`.
        """
        with _device_memory():
            self.runner.stage(weights)

    def calm(self) -> AbstractContextManager[None]:
        """Held while a version is on its way: steps are short meanwhile."""
        return self.engine.calm()

    def probe(self, weights: lora.Weights, ids: Sequence[int] = ()) -> list[float]:
        """What the adapter makes of a short prompt; beside the engine, which goes on.

        Args:
            ids: the prompt, at least two tokens; the model's own when there are none.

        Returns:
            The loss of each token after the first, in nats; NaN for all when a logit is no finite number.

        Raises:
            AdapterRejected: the prompt has a token that the vocabulary has not.
        """
        prompt = list(ids) or self.probe_ids
        if not all(0 <= id < len(self.vocabulary) for id in prompt):
            raise AdapterRejected("its probe has tokens that the base model does not have")
        logits = self.runner.probe(weights, prompt)[:, : len(self.vocabulary)].float()
        if not bool(logits.isfinite().all()):
            return [math.nan] * (len(prompt) - 1)
        targets = torch.tensor(prompt[1:], device=logits.device)
        losses: list[float] = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none").tolist()
        return losses


@contextmanager
def _device_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise ResourceExhausted(
            "the device has no memory for another adapter now",
            hint="Give this replica fewer places (CODEGRAFT_INFERENCE_DEVICE_ADAPTERS).",
            retry_after=1.0,
        ) from None


def load(
    spec: ModelSpec,
    cache_dir: Path,
    limits: Limits,
    *,
    threads: int = 0,
    max_rank: int = 64,
    kind: Kind = "auto",
) -> LoadedModel:
    """Brings the weights here when need be, loads them and starts the engine.

    Raises:
        ModelNotFound, StoreUnavailable …: as :func:`services.core.models.weights.ensure_weights`.
    """
    for setting in _CACHES:
        os.environ.setdefault(setting, "256")
    torch.set_num_threads(1)  # this thread's: see engine/cores.py
    folder = weights.ensure_weights(spec, cache_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = weights.load_model(folder, torch.bfloat16 if packs(device) else None, device)
    tokenizer, digest = weights.load_tokenizer(folder), weights.base_digest(folder)
    threads = threads or os.cpu_count() or 1
    return start(model, tokenizer, spec.id, digest, limits, max_rank=max_rank, kind=kind, threads=threads)


def start(
    model: PreTrainedModel,
    tokenizer: Any,
    model_id: str,
    digest: str,
    limits: Limits,
    *,
    max_rank: int = 64,
    kind: Kind = "auto",
    threads: int | None = None,
) -> LoadedModel:
    """Starts an engine over a model in memory.

    Args:
        threads: of the engine's arithmetic; None leaves them as they are.
        kind: of its weights, see ``InferenceSettings.inference_weights``.
    """
    fmt, vocabulary = prompts.detect(tokenizer), token_bytes(tokenizer)
    base = Base(model_id, digest, fmt, lora.adaptable(model), max_rank)
    runner = Runner(model, Sampler(Spelling(vocabulary)), limits.blocks, threads)
    speed_up(model, kind)
    engine = Engine(runner, limits)
    engine.start()
    context_length = int(model.config.max_position_embeddings)
    probe_ids = probe.prompt(tokenizer)
    return LoadedModel(model, base, tokenizer, fmt, vocabulary, context_length, engine, runner, probe_ids)
