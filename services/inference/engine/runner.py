"""The only owner of tensors: the model, the sequences' keys and values, the sampler's state.

A step is one forward pass over the tokens of all its sequences, prompts and decodes side by side without padding. Used
from the engine's thread only.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from services.inference.adapters.lora import Segment, install
from services.inference.engine.attention import NAME, Row
from services.inference.engine.sampler import Sampler
from services.inference.engine.scheduler import Work
from services.inference.engine.sequence import Sequence


class Runner:
    """Computes steps.

    Args:
        model: a causal LM in eval mode; its linear layers are made to take adapters.
        sampler: chooses the tokens.
    """

    def __init__(self, model: PreTrainedModel, sampler: Sampler) -> None:
        config = model.config
        self._model, self._sampler = model, sampler
        self._active = install(model)
        self._kv: dict[int, torch.Tensor] = {}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._kv_shape = (config.num_hidden_layers, 2, kv_heads, head_dim)
        model.set_attn_implementation(NAME)

    @property
    def sequences_held(self) -> int:
        """Sequences whose keys and values are held."""
        return len(self._kv)

    @torch.inference_mode()
    def step(self, work: list[Work]) -> list[int | None]:
        """Computes the work's tokens; for each entry the sampled token, None while its prompt is not through."""
        # One version's sequences stand side by side, so that its adapter is one product over all of them.
        order = sorted(range(len(work)), key=lambda index: id(work[index].sequence.adapter))
        rows, segments, ids, positions, last = [], list[Segment](), list[int](), list[int](), list[int]()
        for index in order:
            item = work[index]
            begin, end = len(ids), item.start + item.count
            ids += item.sequence.tokens[item.start : end]
            positions += range(item.start, end)
            rows.append(Row(begin, item.count, item.start, self._kv_of(item.sequence)))
            if item.samples:
                last.append(len(ids) - 1)
            if (weights := item.sequence.adapter) is not None:
                if segments and segments[-1].weights is weights and segments[-1].end == begin:
                    segments[-1] = Segment(segments[-1].begin, len(ids), weights)
                else:
                    segments.append(Segment(begin, len(ids), weights))
        device = self._model.device
        with self._active.use(segments):
            logits = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(last, dtype=torch.long, device=device),
                rows=rows,
            ).logits[0]
        sampling = [index for index in order if work[index].samples]
        tokens: list[int | None] = [None] * len(work)
        if sampling:
            sampled = self._sampler.sample(logits, [work[index].sequence for index in sampling])
            for index, token in zip(sampling, sampled, strict=True):
                tokens[index] = token
        for item in work:
            item.sequence.computed = item.start + item.count
        return tokens

    def release(self, sequence: Sequence) -> None:
        """Frees what a sequence holds; one that holds nothing is fine."""
        self._kv.pop(sequence.number, None)
        self._sampler.forget(sequence)

    def _kv_of(self, sequence: Sequence) -> torch.Tensor:
        kv = self._kv.get(sequence.number)
        if kv is None:
            layers, two, kv_heads, head_dim = self._kv_shape
            shape = (layers, two, kv_heads, sequence.capacity, head_dim)
            kv = self._kv[sequence.number] = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        return kv
